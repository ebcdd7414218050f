"""Whether packed segments are what each is alone, at every length of the data: tried on a small
stand-in.

Each segment runs alone through a fresh copy of the unchanged model; then all run as the trainer
runs them, packed, in two orders. Logits, loss and every gradient must be equal. Everything is in
float64, so that what differs by rounding (an expert chosen by a hair) cannot be taken for a leak,
and a leak not for rounding. Where packing is not exact, the same is asked of segments that run one
at a time, and side by side as the rows of a batch, the short ones padded to the longest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor
from transformers import PreTrainedModel

from sftx.model.checks.probe import (
    LONGEST,
    in_order,
    part,
    places,
    random_pack,
    reach,
    segment_lengths,
)
from sftx.model.checks.stand_in import FOREIGN_ERRORS, stand_in, vocabulary
from sftx.model.fallbacks import own_fallbacks
from sftx.model.forward_state import ForwardState, Names
from sftx.model.loss import LogitTransform
from sftx.model.pack_loss import PackLoss, Paths, TensorPack
from sftx.types import UserError

EQUAL = 1e-5
"""Largest difference of logits (of the largest one), of the loss and of a weight's gradient that is
rounding: of float64 and, in the loss, of float32.
"""
EQUAL_IN_A_BATCH = 1e-4
"""The same of a gradient in padded batches. Recurrent layers compute in float32 whatever the weights
are, which moves the gradients of their decay by 1e-5; a leak moves one by more than 1e-3.
"""

ODD_ROWS = 0.1
"""Share of rows that may differ by more than the tolerance: a router's choice by a hair falls
otherwise where products of other sizes round otherwise. A shortcut that does not fit moves nearly
all of them.
"""


@dataclass(frozen=True, slots=True)
class Isolation:
    """What was found: whether segments can be packed; if not, whether they can be the rows of a
    padded batch (`pads`); what a model must forget before each pass when they are not packed
    (empty: nothing; None: everything, because it could not be tried).
    """

    packs: bool
    tried: int  # tokens of the longest segment that was tried, 0 where none was
    reach: int  # tokens up to which the configuration names a length
    forget: Names | None = frozenset()
    pads: bool = False


Gradients = list[Tensor | None]


@dataclass(frozen=True, slots=True)
class _Alone:
    """What a segment gives alone, through the unchanged model; float64."""

    logits: Tensor  # [M, V], at its targets
    loss: float  # summed over its targets
    gradients: Gradients


def measure_isolation(model: PreTrainedModel, longest: int, largest_pack: int) -> Isolation:
    """Try a stand-in for `model` with segments up to `longest` tokens, the longest of the data, in
    packs that become as large as `largest_pack`.

    Raises UserError where segments are not exact even one at a time.
    """
    settings = model.config.to_dict()
    reaches = reach(settings, longest)
    lengths = segment_lengths(settings, longest)
    small = None if max(lengths) > LONGEST else stand_in(model)
    untried = Isolation(reaches == 0, 0, reaches, None, pads=reaches == 0)
    if small is None:
        return untried
    pack = random_pack(lengths, vocabulary(small))
    try:
        alone = [_alone(copy.deepcopy(small), part(pack, number)) for number in range(len(lengths))]
    except FOREIGN_ERRORS:
        return untried
    order = places(settings, lengths, largest_pack)
    if _packs(small, pack, alone, order):
        return Isolation(True, max(lengths), reaches)
    forget = _forget(small, pack, alone)
    pads = _pads(small, pack, alone, order, forget)
    return Isolation(False, max(lengths), reaches, forget, pads)


def _packs(small: PreTrainedModel, pack: TensorPack, alone: list[_Alone], order: list[int]) -> bool:
    """Whether the trainer's fast path is exact."""
    return _at_once(PackLoss(copy.deepcopy(small)).eval(), Paths(), pack, alone, order)


def _pads(
    small: PreTrainedModel,
    pack: TensorPack,
    alone: list[_Alone],
    order: list[int],
    forget: Names,
) -> bool:
    """Whether segments of very unlike lengths are exact as the rows of a batch."""
    loss = PackLoss(copy.deepcopy(small)).eval()
    forgets = ForwardState(loss.model, forget) if forget else None
    paths = Paths(isolate=False, padded=True, forgets=forgets)
    return _at_once(loss, paths, pack, alone, order)


def _at_once(
    loss: PackLoss, paths: Paths, pack: TensorPack, alone: list[_Alone], order: list[int]
) -> bool:
    """Whether the path by which all segments run at once is exact."""
    loss.take(paths)
    try:
        with torch.no_grad():
            transform = matching_transform(loss, in_order(pack, [0, 2, 4]), EQUAL)
        loss.take(replace(paths, transform=transform))
        return _exact(loss, pack, alone, order, loss.own_logits)
    except FOREIGN_ERRORS:  # the model's forward does not take segments, or no batch
        return False


def _forget(small: PreTrainedModel, pack: TensorPack, alone: list[_Alone]) -> Names:
    """What must be put back before each segment, so that one at a time is exact."""
    loss = PackLoss(copy.deepcopy(small)).eval()
    order = list(range(len(alone)))
    fresh = ForwardState(loss.model)
    loss.take(Paths(isolate=False))
    if _exact(loss, pack, alone, order, loss.logits_one_by_one):
        return frozenset()
    names = fresh.changed()
    fresh.put_back()
    loss.take(Paths(isolate=False, forgets=ForwardState(loss.model, names)))
    if _exact(loss, pack, alone, order, loss.logits_one_by_one):
        return names
    raise UserError(
        f"model.path: {type(small).__name__} does not give an example the same loss each time "
        "(measured): what it "
        "computes depends on the examples before it, and it cannot be made to forget them; it "
        "cannot be trained exactly"
    )


def _alone(fresh: PreTrainedModel, one: TensorPack) -> _Alone:
    """A segment through a fresh model, by nothing but the model's own forward."""
    with own_fallbacks():
        logits = fresh(input_ids=one.ids[None], use_cache=False).logits[0][one.index].double()
    losses = torch.nn.functional.cross_entropy(logits, one.label, reduction="none")
    value = (losses * one.weight.double()).sum()
    value.backward()
    return _Alone(logits.detach(), float(value.detach()), [p.grad for p in fresh.parameters()])


def _exact(
    loss: PackLoss,
    pack: TensorPack,
    alone: list[_Alone],
    order: list[int],
    logits_of: Callable[[TensorPack], Tensor],
) -> bool:
    """Whether the trainer's path gives the logits, the loss and the gradients that segments give
    alone; the logits in the opposite order too.
    """
    for numbers in (order, order[::-1]):
        with torch.no_grad():
            found = logits_of(in_order(pack, numbers))
        expected = torch.cat([alone[number].logits for number in numbers])
        if found.shape != expected.shape:
            return False
        if float((found - expected).abs().max()) > EQUAL * float(expected.abs().max()):
            return False
    loss.zero_grad()
    value = loss(in_order(pack, order))
    value.backward()
    expected_loss = sum(alone[number].loss for number in order)
    if abs(float(value.detach()) - expected_loss) > EQUAL * abs(expected_loss):
        return False
    wanted = _sum([alone[number].gradients for number in order])
    limit = EQUAL_IN_A_BATCH if loss.paths.padded else EQUAL
    return _furthest([p.grad for p in loss.model.parameters()], wanted) <= limit


def _sum(parts: list[Gradients]) -> Gradients:
    """The sums of the gradients of each weight; None where it has none."""
    sums: Gradients = []
    for some in zip(*parts, strict=True):
        there = [gradient for gradient in some if gradient is not None]
        sums.append(torch.stack(there).sum(0) if there else None)
    return sums


def _furthest(found: Gradients, wanted: Gradients) -> float:
    """The largest difference of two gradients of a weight, relative to its norm; a norm that is
    tiny beside the others (of what has no gradient but by rounding) counts as a thousandth of the
    largest.
    """
    norms = [float(g.norm()) for g in wanted if g is not None]
    least = 1e-3 * max(norms, default=0.0)
    worst = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        if ours is None and theirs is None:
            continue
        a, b = (torch.zeros(()) if g is None else g for g in (ours, theirs))
        difference = float((a - b).norm())
        if difference > 0:
            worst = max(worst, difference / max(float(b.norm()), least))
    return worst


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
    # The model has no backbone that takes segments and returns hidden states.
    except FOREIGN_ERRORS:
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
