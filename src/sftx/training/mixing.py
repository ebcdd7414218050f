"""Models made of several: the mean of checkpoints, and a mixture with the base."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sftx.model.load import load_model
from sftx.model.trainable import add_rows
from sftx.training.export import Allowed, read_trained, sources
from sftx.training.merging import Trained
from sftx.types import UserError


def read_averaged(
    folder: Path, dtype: str, steps: Sequence[str], allowed: Allowed
) -> tuple[Trained, PreTrainedModel, float]:
    """The mean of the merged weights after these steps, and what goes with the last of them.

    The mean is that of whole weights: the mean of the two matrices of an adapter would be another.
    The number is the largest movement of a logit by merging.
    """
    trained = read_trained(folder, dtype, steps[-1], allowed)
    mean, moved = trained.merged()
    for step in steps[:-1]:
        other, further = read_trained(folder, dtype, step, allowed).merged()
        moved = max(moved, further)
        theirs = dict(other.named_parameters())
        with torch.no_grad():
            for name, parameter in mean.named_parameters():
                parameter.add_(theirs[name])
    with torch.no_grad():
        for parameter in mean.parameters():
            parameter.div_(len(steps))
    return trained, mean, moved


def read_base(folder: Path, trained: Trained, allowed: Allowed) -> PreTrainedModel:
    """The model that the run started from, with rows for the tokens that the run added.

    Raises:
        UserError: run.json names one that is not on this disk.
    """
    config = trained.facts["config"]
    without_adapter = {"config": config | {"adapter": {}}}
    source, _ = sources(folder, without_adapter, True, allowed)
    base = load_model(source, torch.device("cpu"))
    seed = config.get("seed")
    ids = trained.encoder.tokenizer.added_token_ids
    add_rows(base, ids, seed if isinstance(seed, int) else 0)
    return base


def mix(model: Any, base: PreTrainedModel, share: float) -> None:
    """Make the weights of `model` (in place) `share` of theirs and the rest of the base's."""
    theirs = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in theirs or theirs[name].shape != parameter.shape:
                raise UserError(f"sftx export: mix: the base has no {name} of that shape")
            parameter.copy_(torch.lerp(theirs[name], parameter, share))
