"""Start-up checks that measure: what the trainer computes must be what the model itself computes.

Nothing is believed because a configuration says so. Segments go through the model one at a time,
with its own attention and its own head; then packed, by the trainer's path: long ones through a
small stand-in (see `isolation`), a few short ones through the model itself. Where the two differ
the trainer takes a slower path that cannot, and says so: segments as the rows of a padded batch,
or, where that differs too, one at a time. Where no path is right, the run is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sftx.model.adapter import bare, trainable
from sftx.model.checks.isolation import Isolation, matching_transform, measure_isolation
from sftx.model.checks.probe import part
from sftx.model.checks.sharing import apart, kernels_agree, shares_prefixes
from sftx.model.checks.stand_in import FOREIGN_ERRORS
from sftx.model.fallbacks import own_fallbacks
from sftx.model.forward_state import ForwardState
from sftx.model.loss import cross_entropy_sum
from sftx.model.pack_loss import PackLoss, Paths, TensorPack, to_tensors
from sftx.model.regularization import of_each_example
from sftx.model_config import positions_in
from sftx.types import Pack, UserError


def check_sizes(loss: PackLoss, max_length: int, largest_id: int) -> None:
    """Refuse data whose tokens or positions the model does not have."""
    rows = bare(loss.model.get_input_embeddings()).weight.shape[0]
    if largest_id >= rows:
        raise UserError(
            f"token id {largest_id} is outside the vocabulary of the model ({rows} embeddings): "
            "the tokenizer does not "
            "belong to this model, or its new tokens must be listed in model.add_tokens or "
            "model.add_special_tokens"
        )
    positions = positions_in(loss.model.config.get_text_config().to_dict())
    if positions is not None and max_length > positions:
        raise UserError(
            f"data.max_length: {max_length} is more than the {positions} positions of the model"
        )


def check_trainable(loss: PackLoss) -> None:
    """Refuse a run that has nothing to train."""
    if trainable(loss)[0] == 0:
        raise UserError("no parameter is trainable: every weight of the model is frozen")


def check_paths(
    loss: PackLoss,
    probe: Pack,
    precision: torch.dtype,
    longest: int = 1,
    largest_pack: int = 1,
    share: bool = False,
) -> list[str]:
    """Measure the trainer's path against the model's own; choose the fast one where equal.

    Two things are tried: a small stand-in, with segments up to `longest` tokens (those of the
    longest example) in packs of up to `largest_pack`; and the model itself, on the few tokens of
    `probe`. With `share`, also whether segments may share prefixes, as `Paths.shares_prefixes` then
    says. Returns what had to be changed, in words. Raises UserError where the loss is wrong on every
    path.
    """
    name = type(loss.model).__name__
    pack = to_tensors(probe, next(loss.parameters()).device)
    longest = max(longest, pack.longest)
    found = measure_isolation(loss.model, longest, max(longest, largest_pack))
    alone = Paths(isolate=False, forgets=ForwardState(loss.model, found.forget))
    ways = ((found.packs, Paths()), (found.pads, replace(alone, padded=True)))
    tolerance = 1e-3 if precision == torch.float32 else 5e-2
    autocast = torch.autocast(pack.ids.device.type, precision, enabled=precision != torch.float32)
    with evaluating(loss), torch.no_grad(), autocast, _callable_in_parts(loss, pack):
        reference = _reference_logits(loss, pack)
        scale = float(reference.abs().max())
        if not math.isfinite(scale):
            raise UserError(
                "the model's own logits are not finite before training: its weights are damaged"
            )
        limit = tolerance * scale
        for is_exact, way in ways:
            if is_exact and _isolated(loss, way, pack, reference, limit, longest, found.tried > 0):
                break
        else:
            loss.take(alone)
            return [_one_at_a_time(name, found)]
        _choose_transform(loss, pack, reference, tolerance)
        notes = [_side_by_side(name, found)] if loss.paths.padded else []
        if share and loss.paths.isolate:
            notes += _let_share(loss, pack, limit, precision, longest)
    if loss.paths.transform is None:
        how = "logits come from the model's own forward, which needs more memory"
        notes.append(f"the head of {name} is not a plain matrix (measured): {how}")
    return notes


def _choose_transform(
    loss: PackLoss, pack: TensorPack, reference: Tensor, tolerance: float
) -> None:
    """Let the loss come from the head's matrix where that gives the model's own logits.

    Raises UserError where the loss is then not that of the logits `reference`.
    """
    transform = matching_transform(loss, pack, tolerance)
    loss.take(replace(loss.paths, transform=transform))
    fused = float(loss(pack))
    own = float(cross_entropy_sum(reference, pack.label, pack.weight))
    if abs(fused - own) > tolerance * abs(own):
        raise UserError(
            f"the trainer's loss ({fused:.6f}) is not the model's own ({own:.6f}) on a packed probe"
        )


def _let_share(
    loss: PackLoss, pack: TensorPack, limit: float, precision: torch.dtype, longest: int
) -> list[str]:
    """Let segments share prefixes where that is found to be exact; else why not, in words. `limit` =
    how far rounding moves the model's own logits.
    """
    device = pack.ids.device
    half_on_gpu = device.type == "cuda" and precision != torch.float32
    why = of_each_example(loss.objective)
    if not why and half_on_gpu and not kernels_agree(device, precision):
        why = "attention over shared prefixes is not exact on this device (measured)"
    if not why and (apart(loss, pack) > limit or not shares_prefixes(loss, longest)):
        why = f"{type(loss.model).__name__} was not found to give the same through shared prefixes"
    loss.take(replace(loss.paths, shares_prefixes=not why))
    return [f"{why}: every example computes its own prefix"] if why else []


def _side_by_side(name: str, found: Isolation) -> str:
    """Why segments are the rows of padded batches, in words."""
    return (
        f"{name} cannot keep packed segments apart (measured up to {max(found.tried, 1):,} "
        "tokens): examples of like lengths run side by side in right-padded batches, which is exact"
    )


def _one_at_a_time(name: str, found: Isolation) -> str:
    """Why segments are not packed, in words."""
    how = "segments run one at a time, which is exact but slower"
    if not found.tried and not found.packs:
        return (
            f"{name} could not be tried at the lengths of this data, and its configuration names "
            f"{found.reach:,} "
            f"tokens: {how}"
        )
    forgets = (
        ""
        if found.forget == frozenset()
        else "; what it remembers of one is put back before the next"
    )
    return (
        f"{name} cannot keep packed segments apart (measured up to {max(found.tried, 1):,} "
        f"tokens): {how}{forgets}"
    )


@contextmanager
def _callable_in_parts(loss: PackLoss, tensors: TensorPack) -> Iterator[None]:
    """Where the model is in shards, gather what does not belong to a layer, so that its parts run
    on their own.
    """
    if not isinstance(loss, FSDPModule):
        yield
        return
    loss(tensors)  # the first pass must come through the root
    loss.unshard()
    yield
    loss.reshard()


def _reference_logits(loss: PackLoss, pack: TensorPack) -> Tensor:
    """Logits at the targets, each segment on its own through the unchanged model, [M, V]."""
    loss.use_segments(False)
    try:
        segments = itertools.pairwise(pack.cu_seqlens_cpu.tolist())
        with own_fallbacks():
            parts = [
                loss.model(input_ids=pack.ids[None, a:b], use_cache=False).logits[0]
                for a, b in segments
            ]
        return torch.cat(parts).float()[pack.index]
    finally:
        loss.use_segments(True)


def _isolated(
    loss: PackLoss,
    way: Paths,
    pack: TensorPack,
    reference: Tensor,
    limit: float,
    longest: int,
    only_rounding: bool,
) -> bool:
    """By this way, which the model then takes, logits of all segments at once equal the reference,
    beside a token at the last place of a segment as long as the longest (some rotary embeddings go
    by that); and changing the first segment leaves the others' logits alone.

    `limit` = the largest difference. With `only_rounding` the stand-in has shown the structure to
    be right: then the mean over rows counts, and may be twice what rounding alone moves. In bf16
    that can be much: where a router's choice is made by a hair, it falls otherwise, and so does all
    that follows.
    """
    loss.take(way)
    ends = pack.cu_seqlens_cpu
    larger = replace(
        pack,
        ids=torch.cat([pack.ids, pack.ids[:1]]),
        positions=torch.cat([pack.positions, pack.positions[:1] + longest - 1]),
        cu_seqlens_cpu=torch.cat([ends, ends[-1:] + 1]),
    )
    first = int(pack.cu_seqlens_cpu[1])
    changed_ids = larger.ids.clone()
    changed_ids[:first] = changed_ids[:first].roll(1)
    changed_ids[0] = changed_ids[first - 1]
    try:
        packed = loss.own_logits(larger).float()
        if packed.shape != reference.shape:
            return False
        changed = loss.own_logits(replace(larger, ids=changed_ids)).float()
    except FOREIGN_ERRORS:  # the model's forward does not take segments
        return False
    moved = _by_row(packed, reference)
    leaked = _by_row(changed, packed)[pack.index >= first]
    if float(moved.max()) <= limit and float(leaked.max()) <= 1e-3 * limit:
        return True
    if not only_rounding:
        return False
    rounding = _rounding(loss, pack, reference)
    if float(moved.mean()) > max(limit, 2 * rounding):
        return False
    return float(leaked.mean()) <= max(1e-3 * limit, rounding)


def _rounding(loss: PackLoss, pack: TensorPack, reference: Tensor) -> float:
    """How far the trainer's way of computing moves a row where nothing can leak: every segment is a
    pack of its own.
    """
    segments = itertools.pairwise(pack.cu_seqlens_cpu.tolist())
    parts = [loss.own_logits(part(pack, number)).float() for number, _ in enumerate(segments)]
    return float(_by_row(torch.cat(parts), reference).mean())


def _by_row(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference of two elements, for every row [M]."""
    return (one - other).abs().amax(-1)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        # Without a backward pass its outermost weights stay gathered.
        if isinstance(model, FSDPModule):
            model.reshard()
