"""What a finished run gives back: its folder, its numbers, and the trained model when it is asked
for.
"""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sftx.data.tokenizer import Tokenizer
from sftx.model.load import load_model, stored_dtype
from sftx.model.save import load_tokenizer
from sftx.model.trainable import add_rows
from sftx.report.record import Run
from sftx.settings.schema import Config, Model
from sftx.types import StepRecord


@dataclass(frozen=True)
class Result:
    """A finished run.

    `steps` is the number of optimiser steps, `seconds` the time of this call. `loss` is that of the
    last step in nats per unit of weight, `accuracy` its share of targets whose argmax is right, both
    None where no step was taken now. `eval_before` and `eval_after` are the held-out numbers, the
    second those of the model that was written. `best` says which one that is (step, metric, value)
    where the best was chosen; `stopped_early` says why the run ended before its last step, None
    where it did not.
    """

    config: Config = field(repr=False)
    folder: Path
    steps: int
    seconds: float
    loss: float | None
    accuracy: float | None
    eval_before: dict[str, float] | None
    eval_after: dict[str, float] | None
    best: dict[str, Any] | None = None
    stopped_early: str | None = None

    @cached_property
    def model(self) -> PreTrainedModel | PeftModel:
        """The trained model as it was saved, read from `folder` when first asked for; with an
        adapter, peft's model.

        It is on the CPU, in evaluation mode, in the dtype of its folder. Raises UserError where it
        is gone by now.
        """
        model = (
            _saved_adapter(self.config)
            if self.config.adapter.method != "none"
            else _saved_model(self.config)
        )
        model.config.use_cache = True
        return model.eval()

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer that was saved with the model, chat template included."""
        return load_tokenizer(_folder_as_model(self.config))

    @property
    def metrics(self) -> list[StepRecord]:
        """The records in metrics.jsonl; with held-out rows the first is that of step 0, before any
        training.
        """
        return [StepRecord(**line) for line in Run(self.config).metrics()]


def _folder_as_model(config: Config) -> Model:
    """The run's folder as a model to load; code in it is trusted as far as the caller trusted the
    run.
    """
    return Model(path=config.output, trust_remote_code=config.model.trust_remote_code)


def _saved_model(config: Config) -> PreTrainedModel:
    source = _folder_as_model(config)
    return load_model(source, torch.device("cpu"), stored_dtype(source))


def _saved_adapter(config: Config) -> PeftModel:
    """The base that the run started from, with the adapter of its folder."""
    stored = stored_dtype(config.model)
    nf4 = torch.float32 if config.adapter.quantize == "nf4" else None
    base = load_model(config.model, torch.device("cpu"), stored, nf4)
    add_rows(base, Tokenizer.of_model(config.model).added_token_ids, config.seed)
    return PeftModel.from_pretrained(base, config.output)
