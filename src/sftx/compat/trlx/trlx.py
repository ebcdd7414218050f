"""`train`, trlx's one call."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sftx.compat.trlx.data.configs import TRLConfig
from sftx.compat.trlx.data.default_configs import default_sft_config
from sftx.compat.trlx.names import StandIn, refuse
from sftx.compat.trlx.pipeline.offline_pipeline import start_token
from sftx.compat.trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer
from sftx.compat.trlx.trainer.accelerate_sft_trainer import AccelerateSFTTrainer
from sftx.compat.trlx.translate import refuse_several_processes
from sftx.compat.trlx.utils import set_seed
from sftx.compat.trlx.utils.loading import get_pipeline, get_trainer
from sftx.types import UserError


def train(
    model_path: str | None = None,
    reward_fn: Callable[..., object] | None = None,
    dataset: object = None,
    samples: Sequence[object] | None = None,
    rewards: Sequence[float] | None = None,
    prompts: object = None,
    eval_prompts: Sequence[str | Mapping[str, object]] | None = None,
    metric_fn: Callable[..., Mapping[str, object]] | None = None,
    config: TRLConfig | None = None,
    stop_sequences: Sequence[str] | None = None,
) -> Any:
    """Fine-tune on `samples` and return the trainer.

    Strings are plain text, every token a target; lists are alternating prompts and outputs, the
    outputs being targets. `eval_prompts` (texts, or dictionaries with `"prompt"` and extra keys;
    default: BOS, once per element of a batch) are continued before training, every
    `train.eval_interval` steps and at the end, cut at `stop_sequences`, and given to
    `metric_fn(samples=..., prompts=..., outputs=..., **extra)`, which returns lists of numbers by
    name; one that names a parameter `tokenizer` is given that too.
    """
    of_rl = {"reward_fn": reward_fn, "rewards": rewards, "dataset": dataset, "prompts": prompts}
    for name, value in of_rl.items():
        if value is not None:
            refuse(name)
    refuse_several_processes()
    if samples is None or isinstance(samples, str) or len(samples) == 0:
        raise UserError(
            "samples: there is nothing to train on; give texts, or [prompt, output, ...] lists, "
            "in a list of them"
        )
    if config is None:
        warnings.warn(
            "no `config` given: default_sft_config() is used; adapt it instead", stacklevel=2
        )
        config = default_sft_config()
    if model_path:
        config = config.evolve(model={"model_path": model_path})
    set_seed(config.train.seed)
    trainer = _new_trainer(config, metric_fn=metric_fn, stop_sequences=stop_sequences)
    trainer.make_experience(samples, config.train.seq_length)
    _add_prompts(trainer, config, eval_prompts)
    _resume(trainer, config.train.resume_from_checkpoint)
    trainer.learn()
    return trainer


def _new_trainer(config: TRLConfig, **given: object) -> AccelerateSFTTrainer:
    trainer = get_trainer(config.train.trainer)(
        config=config, **given, **config.train.trainer_kwargs
    )
    if isinstance(trainer, StandIn):
        refuse(f"train.trainer {config.train.trainer}", trainer.INSTEAD)
    return trainer


def _add_prompts(
    trainer: AccelerateRLTrainer,
    config: TRLConfig,
    prompts: Sequence[str | Mapping[str, object]] | None,
) -> None:
    """Give the trainer its evaluation prompts, cut so that what is generated has room."""
    if prompts is None:
        prompts = [start_token(trainer.tokenizer)] * config.train.batch_size
    longest = vars(config.method).get("gen_kwargs", {}).get("max_new_tokens")
    if longest is None:
        raise UserError("method.gen_kwargs: max_new_tokens is missing")
    if isinstance(longest, list):
        longest = max(longest)
    pipeline = get_pipeline(config.train.pipeline)
    room = config.train.seq_length - longest
    trainer.add_eval_pipeline(pipeline(prompts, room, trainer.tokenizer))


def _resume(trainer: AccelerateSFTTrainer, folder: str | None) -> None:
    """Continue from `folder` where one is named and there."""
    if folder and os.path.exists(folder):
        trainer.load(folder)
    elif folder:
        print(
            f"note: train.resume_from_checkpoint: there is no {folder}; starting from the "
            "beginning",
            file=sys.stderr,
        )
