"""Activation checkpointing: chosen decoder layers keep their input only, and compute the rest again going backward.

PyTorch's own `checkpoint` does the work, through the switch that transformers puts on every decoder layer. Gradients
are the same to the bit: random numbers (dropout) are drawn again from the same state.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sftx.config import Runtime
from sftx.types import UserError


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The decoder layers of `model` that can be recomputed, first layer first; [] where there are none to be found."""
    stacks = [
        [layer for layer in stack if isinstance(layer, GradientCheckpointingLayer)]
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
    ]
    return max(stacks, key=len, default=[])  # a model may hold a smaller stack beside, an image encoder for one


def layers_to_recompute(runtime: Runtime, model: nn.Module) -> int:
    """How many layers `runtime.recompute` means for `model`."""
    match runtime.recompute:
        case "auto" | "none":
            return 0
        case "all":
            return max(len(decoder_layers(model)), 1)  # a model without layers to be found is refused, not passed over
        case count:
            return count


def recompute(model: nn.Module, count: int) -> None:
    """Recompute the first `count` decoder layers, and no other; UserError where the model has fewer.

    The first ones, because they come last in the backward pass: what they compute again meets an empty memory.
    """
    layers = decoder_layers(model)
    if count > len(layers):
        found = f"has {len(layers)} decoder layers" if layers else "shows no decoder layers that can be recomputed"
        raise UserError(f"runtime.recompute: {count} layers were asked for, but {type(model).__name__} {found}")
    for number in range(len(layers)):
        layer: Any = layers[number]
        layer.gradient_checkpointing = number < count
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
