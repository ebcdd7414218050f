"""The gradients of embedding and head are added where they lie.

Autograd makes each pack's gradient of an embedding as a matrix of the whole vocabulary, and adds
it; where the head shares the weight, that makes three such matrices at once, often the peak of a
step. On a CPU these two add to `.grad` themselves instead, and the head's first gradient of a step
becomes it. Weights that others watch (hooks) or hold in pieces go the usual way, and so does an
embedding that is the first to bring a gradient.

`.grad` is therefore what counts, as for an optimiser; `torch.autograd.grad` would not see what was
added.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def accumulate_in_place(embedding: nn.Module) -> None:
    """Let a plain embedding that trains on a CPU do so; any other is left as it is. The head's part
    is in `loss`.
    """
    if (
        type(embedding) is nn.Embedding
        and embedding.weight.device.type == "cpu"
        and embedding.max_norm is None
    ):
        embedding.__class__ = _Embedding


def accumulates(weight: Tensor) -> bool:
    """A parameter whose gradient is, or would be, plain fp32 in the host's memory, and nobody must
    see it change.
    """
    watched = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    if (
        not isinstance(weight, nn.Parameter)
        or watched
        or any(isinstance(x, DTensor) for x in (weight, weight.grad))
    ):
        return False
    return weight.device.type == "cpu" and weight.dtype == torch.float32


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self.weight.requires_grad:
            return super().forward(input)
        return _Rows.apply(input, self.weight, self.padding_idx)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, ids, rows = ctx.weight, ctx.saved_tensors[0].flatten(), grad.flatten(0, -2)
        if ctx.padding is not None:  # as in nn.Embedding: the row of padding does not train
            rows = rows.masked_fill(ids[:, None] == ctx.padding, 0.0)
        if weight.grad is not None and accumulates(weight):
            weight.grad.index_add_(0, ids, rows.to(weight.grad.dtype))
            return None, None, None
        return None, torch.zeros_like(weight).index_add_(0, ids, rows.to(weight.dtype)), None
