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
_GENERATE = {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}


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
        method=SFTConfig("sftconfig", dict(_GENERATE)),
    )


def default_ppo_config() -> TRLConfig:
    """A configuration to read and to change; no trainer here runs it."""
    return _of_rl("PPOConfig", "AcceleratePPOTrainer")


def default_ilql_config() -> TRLConfig:
    """A configuration to read and to change; no trainer here runs it."""
    return _of_rl("ILQLConfig", "AccelerateILQLTrainer")


def _of_rl(method: str, trainer: str) -> TRLConfig:
    config = default_sft_config()
    config.method = by_name(method)(name=method, gen_kwargs=dict(_GENERATE))
    config.train.trainer = trainer
    return config
