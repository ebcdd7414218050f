"""A low-rank adapter and the linear layer beneath it as one autograd function: y = x W^T + b + s (x
A^T) B^T.

Autograd over peft's own forward keeps x A^T, and under autocast a copy of x for each of the two
paths; the sum costs two more passes over y, forward and backward. Here only `x` itself is kept
(layers that share their input share it), and x A^T, which is small, is computed again. Same
operations otherwise, in the same dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

Settings = tuple[float, torch.dtype, torch.dtype]
"""Scale of the adapter; dtypes of the base layer's product and of the adapter's."""


def fuse(model: nn.Module) -> int:
    """Let every plain adapted linear layer of `model` compute in one function; how many there are.

    Plain is: one adapter, no dropout, no DoRA or other variant, no bias of its own, an unquantised
    `nn.Linear` beneath. Others are left to peft.
    """
    plain = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for module in plain:
        module.__class__ = LoraLinear
    return len(plain)


def _is_plain(module: Linear) -> bool:
    return (
        type(module.base_layer) is nn.Linear
        and len(module.lora_A) == 1
        and not module.lora_variant
        and not any(module.lora_bias.values())
        and all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())
        and not module.base_layer.weight.requires_grad
    )


class LoraLinear(Linear):
    """peft's layer with the fused forward; what is not the plain case any more goes to peft's own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` [..., in] -> [..., out], in the dtype that the base layer alone would return."""
        name = next(iter(self.active_adapters), "")
        is_off = self.disable_adapters or self.merged or name not in self.lora_A
        if args or kwargs or is_off or not _is_plain(self):
            return super().forward(x, *args, **kwargs)
        down = self.lora_A[name].weight
        up = self.lora_B[name].weight
        base = x.dtype
        low_rank = down.dtype
        if torch.is_autocast_enabled(x.device.type):
            base = low_rank = torch.get_autocast_dtype(x.device.type)
        settings = self.scaling[name], base, low_rank
        plain = self.base_layer
        return _LoraLinear.apply(x, plain.weight, plain.bias, down, up, settings)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        settings: Settings,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.settings = settings
        scaling, base, low_rank = settings
        if bias is not None:
            bias = bias.to(base)
        out = F.linear(x.to(base), weight.to(base), bias)
        small = x.flatten(0, -2).to(low_rank) @ down.to(low_rank).t()
        flat = out.flatten(0, -2).to(low_rank)
        flat.addmm_(small, up.to(low_rank).t(), alpha=scaling)
        return flat.to(base).view(out.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, down, up = ctx.saved_tensors
        scaling, base, low_rank = ctx.settings
        flat_grad = grad.flatten(0, -2).to(low_rank)
        flat_x = x.flatten(0, -2).to(low_rank)
        a = down.to(low_rank)
        small_grad = (flat_grad @ up.to(low_rank)) * scaling
        d_up = flat_grad.t() @ ((flat_x @ a.t()) * scaling)
        d_down = small_grad.t() @ flat_x
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = grad.flatten(0, -2).to(base) @ weight.to(base)
            d_x = d_x.to(low_rank).addmm_(small_grad, a)
            d_x = d_x.to(x.dtype).view(x.shape)
        return d_x, None, None, d_down.to(down.dtype), d_up.to(up.dtype), None
