"""The configurations that trlx's scripts start with."""

from __future__ import annotations

from typing import Any

from sftx.compat.trlx.data.configs import (
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
)
from sftx.compat.trlx.names import by_name
from sftx.compat.trlx.trainer.accelerate_sft_trainer import SFTConfig

__getattr__ = by_name  # NeMo's, by name alone
PPOConfig: Any = by_name("PPOConfig")
ILQLConfig: Any = by_name("ILQLConfig")


def default_sft_config() -> TRLConfig:
    """gpt2, 1,000 steps of 8 samples, AdamW at a constant 1e-4."""
    return TRLConfig(
        train=TrainConfig(
            seq_length=1024,
            epochs=100,
            total_steps=1000,
            batch_size=8,
            checkpoint_interval=10000,
            eval_interval=100,
            pipeline="PromptPipeline",
            trainer="AccelerateSFTTrainer",
        ),
        model=ModelConfig(model_path="gpt2", num_layers_unfrozen=-1),
        tokenizer=TokenizerConfig(tokenizer_path="gpt2", truncation_side="right"),
        optimizer=OptimizerConfig(
            "adamw", {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-6}
        ),
        scheduler=SchedulerConfig("cosine_annealing", {"T_max": 1e12, "eta_min": 1e-4}),
        method=SFTConfig(
            "sftconfig", {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}
        ),
    )


def default_ppo_config() -> TRLConfig:
    """trlx's, to read and to change; no trainer here runs it."""
    config = default_sft_config()
    method = PPOConfig(
        name="PPOConfig",
        num_rollouts=128,
        chunk_size=128,
        ppo_epochs=4,
        init_kl_coef=0.001,
        target=None,
        horizon=10000,
        gamma=1,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=1,
        scale_reward="ignored",
        ref_mean=None,
        ref_std=None,
        cliprange_reward=10,
        gen_kwargs={"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True},
    )
    config.train.total_steps, config.train.batch_size = 10000, 32
    config.model = ModelConfig(model_path="lvwerra/gpt2-imdb", num_layers_unfrozen=2)
    return _with_method(config, "AcceleratePPOTrainer", method, 3e-5)


def default_ilql_config() -> TRLConfig:
    """trlx's, to read and to change; no trainer here runs it."""
    config = default_sft_config()
    method = ILQLConfig(
        name="ilqlconfig",
        tau=0.7,
        gamma=0.99,
        cql_scale=0.1,
        awac_scale=1,
        alpha=0.001,
        beta=0,
        steps_for_target_q_sync=5,
        two_qs=True,
        gen_kwargs={"max_new_tokens": 56, "top_k": 20, "beta": 1, "temperature": 1.0},
    )
    config.train.seq_length, config.train.batch_size = 64, 128
    config.train.checkpoint_interval = 1000
    return _with_method(config, "AccelerateILQLTrainer", method, 5e-5)


def _with_method(config: TRLConfig, trainer: str, method: Any, learning_rate: float) -> TRLConfig:
    config.train.trainer, config.method = trainer, method
    config.optimizer.kwargs["lr"] = config.scheduler.kwargs["eta_min"] = learning_rate
    return config
