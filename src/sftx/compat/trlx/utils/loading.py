"""Trainers and pipelines by name."""

from __future__ import annotations

from typing import Any

import sftx.compat.trlx.pipeline.offline_pipeline
import sftx.compat.trlx.trainer.accelerate_sft_trainer  # noqa: F401 - importing registers
from sftx.compat.trlx.pipeline import _DATAPIPELINE
from sftx.compat.trlx.rl import refuse
from sftx.compat.trlx.trainer import _TRAINERS
from sftx.types import UserError


def get_trainer(name: str) -> Any:
    """The trainer registered under `name`, in any case of letters."""
    if name.lower() in _TRAINERS:
        return _TRAINERS[name.lower()]
    if any(method in name.lower() for method in ("ppo", "ilql", "rft", "dpo")):
        refuse(f"train.trainer {name}")
    if name.lower().startswith("nemo"):
        raise UserError(f"train.trainer {name}: sftx has no NeMo backend; use AccelerateSFTTrainer")
    raise UserError(f"train.trainer {name} has not been registered; known: {', '.join(_TRAINERS)}")


def get_pipeline(name: str) -> Any:
    """The pipeline registered under `name`, in any case of letters."""
    if name.lower() in _DATAPIPELINE:
        return _DATAPIPELINE[name.lower()]
    raise UserError(f"train.pipeline {name} has not been registered; known: {', '.join(_DATAPIPELINE)}")
