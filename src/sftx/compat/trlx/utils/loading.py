"""Trainers and pipelines by name."""

from __future__ import annotations

import sftx.compat.trlx.pipeline.offline_pipeline
import sftx.compat.trlx.trainer.accelerate_sft_trainer  # noqa: F401 - importing registers
from sftx.compat.trlx.pipeline import _DATAPIPELINE
from sftx.compat.trlx.trainer import _TRAINERS

get_trainer = _TRAINERS.get
get_pipeline = _DATAPIPELINE.get
