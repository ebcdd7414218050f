"""From the second pack of a step on, gradients are added where they lie.

Autograd makes each pack's gradient of a weight as a matrix of its own and then adds it: three passes over memory that
small packs repeat often, and for a large vocabulary the peak of the step. Products can add to what is there instead.
On a CPU, where memory is slow, this is what makes small packs cheap. The first pack of a step, and weights that others
watch (hooks) or hold in pieces, go the usual way; so do the products of autocast, whose gradients are not fp32.

A weight's `.grad` is therefore what counts, as for an optimiser; `torch.autograd.grad` would not see what was added.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def accumulate_in_place(model: nn.Module, head: nn.Module | None) -> None:
    """Let every plain linear layer and embedding of `model` that trains on a CPU do so; not the `head`, whose gradient
    the loss computes."""
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if module is head or not isinstance(weight, nn.Parameter) or weight.device.type != "cpu":
            continue
        if weight.requires_grad and type(module) is nn.Linear:
            module.__class__ = _Linear
        elif weight.requires_grad and type(module) is nn.Embedding:
            module.__class__ = _Embedding


def accumulates(weight: Tensor) -> bool:
    """There is a plain gradient to add to, and nobody who must see the addition."""
    watched = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return weight.is_leaf and type(weight.grad) is Tensor and not watched and weight.grad.dtype == torch.float32


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        usual = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or input.dtype != torch.float32
        if usual or not self.weight.requires_grad:
            return super().forward(input)
        return _Product.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None or torch.compiler.is_compiling() or not self.weight.requires_grad:
            return super().forward(input)
        return _Rows.apply(input, self.weight, self.padding_idx)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs_x, _, needs_bias = ctx.needs_input_grad
        weight, x, flat = ctx.weight, ctx.saved_tensors[0].flatten(0, -2), grad.flatten(0, -2)
        d_x = (flat @ weight).view(*grad.shape[:-1], -1) if needs_x else None
        d_bias = flat.sum(0) if needs_bias else None
        if accumulates(weight):
            weight.grad.addmm_(flat.t(), x)
            return d_x, None, d_bias
        return d_x, flat.t() @ x, d_bias


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
        if accumulates(weight):
            weight.grad.index_add_(0, ids, rows.to(weight.grad.dtype))
            return None, None, None
        return None, torch.zeros_like(weight).index_add_(0, ids, rows.to(weight.dtype)), None
