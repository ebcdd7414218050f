"""Start-up checks that measure: what the trainer computes must be what the model itself computes.

Nothing is believed because a configuration says so. A few short segments go through the model one at a time, with its
own attention and its own head; then packed, by the trainer's path. Where the two differ the trainer takes a slower
path that cannot, and says so; where no path is right, the run is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sftx.model.adapter import bare, trainable
from sftx.model.load import PackLoss, to_tensors
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


def check_paths(loss: PackLoss, pack: Pack, precision: torch.dtype) -> list[str]:
    """Measure the trainer's path against the model's own on a small pack; choose the fast one where equal.

    Returns what had to be changed, in words. Raises UserError where the loss is wrong on every path.
    """
    device = next(loss.parameters()).device
    tolerance = 1e-3 if precision == torch.float32 else 5e-2
    autocast = nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)
    notes: list[str] = []
    with evaluating(loss), torch.no_grad(), autocast, _callable_in_parts(loss, pack):
        reference = _reference_logits(loss, pack, device)
        scale = float(reference.abs().max())
        if not np.isfinite(scale):
            raise UserError("the model's own logits are not finite before training: its weights are damaged")
        if not _isolated(loss, pack, device, reference, tolerance * scale):
            loss.isolate = False
            loss.use_segments(False)
            notes.append(
                f"{type(loss.model).__name__} cannot keep packed segments apart (measured): "
                "segments run one at a time, which is exact but slower"
            )
            return notes
        loss.transform = _matching_transform(loss, pack, device, reference, tolerance * scale)
        if loss.transform is None:
            notes.append(
                f"the head of {type(loss.model).__name__} is not a plain matrix (measured): "
                "logits come from the model's own forward, which needs more memory"
            )
        tensors = to_tensors(pack, device)
        loss.prunes = loss.transform is not None and _prunes(loss, tensors, tolerance)
        fused = float(loss(**tensors))
        own = float(cross_entropy_sum(reference, tensors["label"], tensors["weight"]))
        if abs(fused - own) > tolerance * abs(own):
            raise UserError(f"the trainer's loss ({fused:.6f}) is not the model's own ({own:.6f}) on a packed probe")
    return notes


@contextmanager
def _callable_in_parts(loss: PackLoss, pack: Pack) -> Iterator[None]:
    """Where the model is in shards, gather what does not belong to a layer, so that its parts run on their own."""
    if not isinstance(loss, FSDPModule):
        yield
        return
    loss(**to_tensors(pack, next(loss.parameters()).device))  # the first pass must come through the root
    loss.unshard()
    yield
    loss.reshard()


def _reference_logits(loss: PackLoss, pack: Pack, device: torch.device) -> Tensor:
    """Logits at the targets, each segment on its own through the unchanged model, [M, V]."""
    loss.use_segments(False)
    try:
        borders = pack.cu_seqlens.tolist()
        parts = []
        for a, b in itertools.pairwise(borders):
            ids = torch.as_tensor(pack.ids[a:b], dtype=torch.int64, device=device)
            parts.append(loss.model(input_ids=ids[None], use_cache=False).logits[0])
        return torch.cat(parts).float()[torch.as_tensor(pack.index, dtype=torch.int64, device=device)]
    finally:
        loss.use_segments(True)


def _isolated(loss: PackLoss, pack: Pack, device: torch.device, reference: Tensor, tolerance: float) -> bool:
    """Packed logits equal the reference, and changing the first segment leaves the others' logits alone."""
    changed_ids = pack.ids.copy()
    first = int(pack.cu_seqlens[1])
    changed_ids[:first] = np.roll(changed_ids[:first], 1)
    changed_ids[0] = changed_ids[first - 1]
    tensors = to_tensors(pack, device)
    arguments = tensors["positions"], tensors["cu_seqlens"], tensors["index"], tensors["longest"]
    try:
        packed = loss.own_logits(tensors["ids"], *arguments).float()
        if packed.shape != reference.shape or float((packed - reference).abs().max()) > tolerance:
            return False
        changed = loss.own_logits(torch.as_tensor(changed_ids, dtype=torch.int64, device=device), *arguments).float()
    except (TypeError, ValueError):  # the model's forward does not take segments
        return False
    others = tensors["index"] >= first
    return float((changed - packed)[others].abs().max()) <= 1e-3 * tolerance


def _matching_transform(
    loss: PackLoss, pack: Pack, device: torch.device, reference: Tensor, tolerance: float
) -> LogitTransform | None:
    """The transform under which head(hidden) equals the model's logits; None if there is none among the known."""
    head: Any = loss.model.get_output_embeddings()
    if type(head) not in (torch.nn.Linear, TrainableTokensWrapper) or head._forward_hooks or head._forward_pre_hooks:
        return None
    tensors = to_tensors(pack, device)
    try:
        hidden = loss.hidden(tensors["ids"], tensors["positions"], tensors["cu_seqlens"], tensors["longest"])
    except (TypeError, AttributeError):
        return None
    raw = head(hidden[tensors["index"]]).float()
    if raw.shape != reference.shape:
        return None
    config = loss.model.config.get_text_config()
    names = config.to_dict()
    softcap = float(names.get("final_logit_softcapping") or 0.0)
    candidates = [LogitTransform(softcap=softcap)]
    if names.get("logit_scale"):
        candidates.append(LogitTransform(scale=float(names["logit_scale"]), softcap=softcap))
    if names.get("logits_scaling"):
        candidates.append(LogitTransform(scale=1.0 / float(names["logits_scaling"]), softcap=softcap))
    for transform in candidates:
        if float((transform(raw) - reference).abs().max()) <= tolerance:
            return transform
    return None


def _prunes(loss: PackLoss, tensors: dict[str, Any], tolerance: float) -> bool:
    """Every third row comes out of the pruned last layer as it does of the whole one."""
    arguments = {name: tensors[name] for name in ("ids", "positions", "cu_seqlens", "longest")}
    rows = tensors["index"][::3]
    try:
        whole, pruned = loss.hidden(**arguments)[rows], loss.hidden(**arguments, rows=rows)[rows]
    except (TypeError, AttributeError, RuntimeError):  # a module takes or returns something else than one tensor
        return False
    return float((whole - pruned).abs().max()) <= tolerance * float(whole.abs().max())


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
