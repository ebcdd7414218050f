"""Start-up checks that measure: what the trainer computes must be what the model itself computes.

Nothing is believed because a configuration says so. A few short segments go through the model one at a time, with its
own attention and its own head; then packed, by the trainer's path. Where the two differ the trainer takes a slower
path that cannot, and says so; where no path is right, the run is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sftx.model.adapter import bare, trainable
from sftx.model.load import PackLoss, TensorPack, to_tensors
from sftx.model.loss import LogitTransform, cross_entropy_sum
from sftx.types import Pack, UserError


def check_sizes(loss: PackLoss, max_length: int, largest_id: int) -> None:
    """Refuse a run whose tokens or positions the model does not have, or that has nothing to train."""
    config = loss.model.config.get_text_config()
    rows = bare(loss.model.get_input_embeddings()).weight.shape[0]
    if largest_id >= rows:
        raise UserError(
            f"token id {largest_id} is outside the vocabulary of the model ({rows} embeddings): the tokenizer does not "
            "belong to this model, or its new tokens must be listed in model.add_tokens or model.add_special_tokens"
        )
    positions = getattr(config, "max_position_embeddings", None)  # absent in models without position limits
    if positions is not None and max_length > positions:
        raise UserError(f"data.max_length: {max_length} is more than the {positions} positions of the model")
    if trainable(loss)[0] == 0:
        raise UserError("no parameter is trainable: every weight of the model is frozen")


def check_paths(loss: PackLoss, probe: Pack, precision: torch.dtype, longest: int = 1) -> list[str]:
    """Measure the trainer's path against the model's own on a small pack; choose the fast one where equal.

    `longest` = tokens of the longest example that may stand beside others. Returns what had to be changed, in words.
    Raises UserError where the loss is wrong on every path.
    """
    name, pack = type(loss.model).__name__, to_tensors(probe, next(loss.parameters()).device)
    tolerance = 1e-3 if precision == torch.float32 else 5e-2
    autocast = torch.autocast(pack.ids.device.type, precision, enabled=precision != torch.float32)
    with evaluating(loss), torch.no_grad(), autocast, _callable_in_parts(loss, pack):
        reference = _reference_logits(loss, pack)
        scale = float(reference.abs().max())
        if not math.isfinite(scale):
            raise UserError("the model's own logits are not finite before training: its weights are damaged")
        if not _isolated(loss, pack, reference, tolerance * scale, longest):
            loss.isolate = False
            loss.use_segments(False)
            how = "segments run one at a time, which is exact but slower"
            return [f"{name} cannot keep packed segments apart (measured): {how}"]
        loss.transform = _matching_transform(loss, pack, reference, tolerance * scale)
        loss.prunes = loss.transform is not None and _prunes(loss, pack, tolerance)
        fused, own = float(loss(pack)), float(cross_entropy_sum(reference, pack.label, pack.weight))
        if abs(fused - own) > tolerance * abs(own):
            raise UserError(f"the trainer's loss ({fused:.6f}) is not the model's own ({own:.6f}) on a packed probe")
    if loss.transform is None:
        how = "logits come from the model's own forward, which needs more memory"
        return [f"the head of {name} is not a plain matrix (measured): {how}"]
    return []


@contextmanager
def _callable_in_parts(loss: PackLoss, tensors: TensorPack) -> Iterator[None]:
    """Where the model is in shards, gather what does not belong to a layer, so that its parts run on their own."""
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
        segments = itertools.pairwise(pack.borders.tolist())
        parts = [loss.model(input_ids=pack.ids[None, a:b], use_cache=False).logits[0] for a, b in segments]
        return torch.cat(parts).float()[pack.index]
    finally:
        loss.use_segments(True)


def _isolated(loss: PackLoss, pack: TensorPack, reference: Tensor, tolerance: float, longest: int) -> bool:
    """Packed logits equal the reference, beside a token at the last place of a segment as long as the longest (some
    rotary embeddings go by that); and changing the first segment leaves the others' logits alone."""
    ids, positions = torch.cat([pack.ids, pack.ids[:1]]), torch.cat([pack.positions, pack.positions[:1] + longest - 1])
    pack = replace(pack, ids=ids, positions=positions, borders=torch.cat([pack.borders, pack.borders[-1:] + 1]))
    first = int(pack.borders[1])
    changed_ids = pack.ids.clone()
    changed_ids[:first] = changed_ids[:first].roll(1)
    changed_ids[0] = changed_ids[first - 1]
    try:
        packed = loss.own_logits(pack).float()
        if packed.shape != reference.shape or float((packed - reference).abs().max()) > tolerance:
            return False
        changed = loss.own_logits(replace(pack, ids=changed_ids)).float()
    except (TypeError, ValueError):  # the model's forward does not take segments
        return False
    return float((changed - packed)[pack.index >= first].abs().max()) <= 1e-3 * tolerance


def _matching_transform(loss: PackLoss, pack: TensorPack, reference: Tensor, tolerance: float) -> LogitTransform | None:
    """The transform under which head(hidden) equals the model's logits; None if there is none among the known."""
    head: Any = loss.model.get_output_embeddings()
    if type(head) not in (torch.nn.Linear, TrainableTokensWrapper) or head._forward_hooks or head._forward_pre_hooks:
        return None
    try:
        raw = head(loss.hidden(pack)[pack.index]).float()
    except (TypeError, AttributeError):
        return None
    names = loss.model.config.get_text_config().to_dict()
    softcap = float(names.get("final_logit_softcapping") or 0.0)
    scales = [1.0, float(names.get("logit_scale") or 1.0), 1.0 / float(names.get("logits_scaling") or 1.0)]
    candidates = (LogitTransform(scale, softcap) for scale in scales)
    fitting = (c for c in candidates if raw.shape == reference.shape and _apart(c(raw), reference) <= tolerance)
    return next(fitting, None)


def _prunes(loss: PackLoss, pack: TensorPack, tolerance: float) -> bool:
    """Every third row comes out of the pruned last layer as it does of the whole one."""
    rows = pack.index[::3]
    try:
        whole, pruned = loss.hidden(pack)[rows], loss.hidden(pack, rows)[rows]
    except (TypeError, AttributeError, RuntimeError):  # a module takes or returns something else than one tensor
        return False
    return _apart(whole, pruned) <= tolerance * float(whole.abs().max())


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of two elements."""
    return float((one - other).abs().max())


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        if isinstance(model, FSDPModule):  # without a backward pass its outermost weights stay gathered
            model.reshard()
