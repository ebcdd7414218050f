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
from sftx.model.fallbacks import own_fallbacks, without_kernels
from sftx.model.forward_state import ForwardState, Names
from sftx.model.loss import LogitTransform
from sftx.model.pack_loss import PackLoss, Paths, TensorPack
from sftx.types import UserError

EQUAL = 1e-5
"""Largest difference of logits (of the largest one), of the loss and of a weight's gradient that is
rounding: of float64 and, in the loss, of float32.
"""
EQUAL_UNPACKED = 1e-4
"""The same of a gradient in padded batches and of segments one at a time. Recurrent layers compute in
float32 whatever the weights are, which moves the gradients of their decay by 2e-5; a leak moves one
by more than 1e-3.
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
    lengths = segment_lengths(settings, longest)
    reaches = reach(settings, longest)
    untried = Isolation(reaches == 0, 0, reaches, None, pads=reaches == 0)
    with without_kernels(model) as has_kernels:
        small = None if max(lengths) > LONGEST else stand_in(model)
        if small is None:
            return untried
        pack = random_pack(lengths, vocabulary(small))
        order = places(settings, lengths, largest_pack)
        try:
            trial = _trial(small, pack, order)
        except FOREIGN_ERRORS:
            return untried
        if _at_once(_fresh_loss(small), Paths(), trial):
            return Isolation(True, max(lengths), reaches)
        forget = _forget(_fresh_loss(small), replace(trial, order=list(range(len(lengths)))))
        loss = _fresh_loss(small)
        forgets = ForwardState(loss.model, forget) if forget else None
        padded = Paths(isolate=False, padded=True, forgets=forgets)
        pads = _at_once(loss, padded, trial)
    packs = has_kernels and _kernels_pack(small, model.device, pack, order)
    return Isolation(packs, max(lengths), reaches, forget, pads)


def _kernels_pack(
    small: PreTrainedModel, device: torch.device, pack: TensorPack, order: list[int]
) -> bool:
    """Whether kernels of recurrent layers, which take neither float64 nor a CPU, keep segments
    apart.
    """
    torch.nn.Module.to(small, device, torch.float32)
    tensors = ("ids", "positions", "index", "label", "weight")
    moved = {name: getattr(pack, name).to(device) for name in tensors}
    pack = replace(pack, **moved)
    try:
        trial = _trial(small, pack, order)
    except FOREIGN_ERRORS:
        return False
    return _at_once(_fresh_loss(small), Paths(), trial)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Segments, what each gives alone, and the order in which they follow one another."""

    pack: TensorPack
    alone: list[_Alone]
    order: list[int]


def _trial(small: PreTrainedModel, pack: TensorPack, order: list[int]) -> _Trial:
    alone = [_alone(copy.deepcopy(small), part(pack, number)) for number in range(len(pack.counts))]
    return _Trial(pack, alone, order)


def _fresh_loss(small: PreTrainedModel) -> PackLoss:
    return PackLoss(copy.deepcopy(small)).eval()


def _at_once(loss: PackLoss, paths: Paths, trial: _Trial) -> bool:
    """Whether the path by which all segments run at once is exact."""
    loss.take(paths)
    try:
        with torch.no_grad():
            transform = matching_transform(loss, in_order(trial.pack, [0, 2, 4]), EQUAL)
        loss.take(replace(paths, transform=transform))
        return _exact(loss, trial, loss.own_logits)
    except FOREIGN_ERRORS:  # the model's forward does not take segments, or no batch
        return False


def _forget(loss: PackLoss, trial: _Trial) -> Names:
    """What must be put back before each segment, so that one at a time is exact."""
    fresh = ForwardState(loss.model)
    loss.take(Paths(isolate=False))
    if _exact(loss, trial, loss.logits_one_by_one):
        return frozenset()
    names = fresh.changed()
    fresh.put_back()
    loss.take(Paths(isolate=False, forgets=ForwardState(loss.model, names)))
    if _exact(loss, trial, loss.logits_one_by_one):
        return names
    raise UserError(
        f"model.path: {type(loss.model).__name__} does not give an example the same loss each time "
        "(measured): what it "
        "computes depends on the examples before it, and it cannot be made to forget them; it "
        "cannot be trained exactly"
    )


def _alone(fresh: PreTrainedModel, one: TensorPack) -> _Alone:
    """A segment through a fresh model, by nothing but the model's own forward."""
    with own_fallbacks():
        out = fresh(input_ids=one.ids[None], use_cache=False)
    logits = out.logits[0][one.index].double()
    losses = torch.nn.functional.cross_entropy(logits, one.label, reduction="none")
    value = (losses * one.weight.double()).sum()
    value.backward()
    gradients = [p.grad for p in fresh.parameters()]
    return _Alone(logits.detach(), float(value.detach()), gradients)


def _exact(loss: PackLoss, trial: _Trial, logits_of: Callable[[TensorPack], Tensor]) -> bool:
    """Whether the trainer's path gives the logits, the loss and the gradients that segments give
    alone; the logits in the opposite order too.
    """
    order = trial.order
    for numbers in (order, order[::-1]):
        with torch.no_grad():
            found = logits_of(in_order(trial.pack, numbers))
        expected = torch.cat([trial.alone[number].logits for number in numbers])
        if found.shape != expected.shape:
            return False
        apart = float((found - expected).abs().max())
        if apart > EQUAL * float(expected.abs().max()):
            return False
    loss.zero_grad()
    value = loss(in_order(trial.pack, order))
    value.backward()
    wanted_loss, wanted = _sum([trial.alone[number] for number in order])
    if abs(float(value.detach()) - wanted_loss) > EQUAL * abs(wanted_loss):
        return False
    limit = EQUAL if loss.paths.isolate else EQUAL_UNPACKED
    return _furthest([p.grad for p in loss.model.parameters()], wanted) <= limit


def _sum(parts: list[_Alone]) -> tuple[float, Gradients]:
    """The sums of the losses, and of the gradients of each weight; None where it has none."""
    sums: Gradients = []
    for some in zip(*[one.gradients for one in parts], strict=True):
        there = [gradient for gradient in some if gradient is not None]
        sums.append(torch.stack(there).sum(0) if there else None)
    return sum(one.loss for one in parts), sums


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
    if type(head) not in (torch.nn.Linear, TrainableTokensWrapper):
        return None
    if head._forward_hooks or head._forward_pre_hooks:
        return None
    own = loss.own_logits(pack).float()
    try:
        raw = head(loss.hidden(pack)[pack.index]).float()
    # The model has no backbone that takes segments and returns hidden states.
    except FOREIGN_ERRORS:
        return None
    if raw.shape != own.shape:
        return None
    for transform in _known_transforms(loss.model.config.get_text_config().to_dict()):
        if nearly_equal(transform(raw), own, tolerance):
            return transform
    return None


def _known_transforms(settings: dict[str, Any]) -> list[LogitTransform]:
    """What a configuration may say of the way from the head to the logits."""
    softcap = float(settings.get("final_logit_softcapping") or 0.0)
    factor = float(settings.get("logit_scale") or 1.0)
    divisor = float(settings.get("logits_scaling") or 1.0)
    return [LogitTransform(scale, softcap) for scale in (1.0, factor, 1.0 / divisor)]


def nearly_equal(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether nine rows in ten of two matrices are equal within `tolerance` of the largest element."""
    apart = (found - wanted).abs().amax(-1)
    odd = apart > tolerance * float(wanted.abs().max())
    return float(odd.float().mean()) <= ODD_ROWS
