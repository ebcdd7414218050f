"""The trainer's shortcut, tried on a pack before it is taken: the head as a matrix."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor

from sftx.model.checks.stand_in import FOREIGN_ERRORS
from sftx.model.load import PackLoss, TensorPack
from sftx.model.loss import LogitTransform

ODD_ROWS = 0.1
"""Share of rows that may differ by more than the tolerance: a router's choice by a hair falls
otherwise where products of other sizes round otherwise. A shortcut that does not fit moves nearly
all of them.
"""


def choose_shortcuts(loss: PackLoss, pack: TensorPack, tolerance: float) -> None:
    """Set `loss.transform` to what gives, on `pack`, what the model's own forward gives.

    `tolerance` is relative to the largest value.
    """
    loss.transform = matching_transform(loss, pack, tolerance)


def matching_transform(loss: PackLoss, pack: TensorPack, tolerance: float) -> LogitTransform | None:
    """The transform under which head(hidden) equals the model's logits; None if there is none among
    the known.
    """
    head: Any = loss.model.get_output_embeddings()
    if (
        type(head) not in (torch.nn.Linear, TrainableTokensWrapper)
        or head._forward_hooks
        or head._forward_pre_hooks
    ):
        return None
    own = loss.own_logits(pack).float()
    try:
        raw = head(loss.hidden(pack)[pack.index]).float()
    except (
        FOREIGN_ERRORS
    ):  # the model has no backbone that takes segments and returns hidden states
        return None
    if raw.shape != own.shape:
        return None
    names = loss.model.config.get_text_config().to_dict()
    softcap = float(names.get("final_logit_softcapping") or 0.0)
    scales = [
        1.0,
        float(names.get("logit_scale") or 1.0),
        1.0 / float(names.get("logits_scaling") or 1.0),
    ]
    candidates = (LogitTransform(scale, softcap) for scale in scales)
    return next((c for c in candidates if nearly_equal(c(raw), own, tolerance)), None)


def nearly_equal(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether nine rows in ten of two matrices are equal within `tolerance` of the largest element."""
    apart = (found - wanted).abs().amax(-1)
    odd = apart > tolerance * float(wanted.abs().max())
    return float(odd.float().mean()) <= ODD_ROWS
