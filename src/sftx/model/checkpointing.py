"""Activation checkpointing: chosen decoder layers keep their input only, and compute the rest again
going backward.

PyTorch's own `checkpoint` does the work, through the switch that transformers puts on every decoder
layer. Gradients are the same to the bit: random numbers (dropout) are drawn again from the same
state.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sftx.types import UserError


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of `model` that can be recomputed, first to last; empty where none can be
    found.
    """
    # Beside its decoder a model may hold a deeper stack, one for images.
    decoder: nn.Module = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    stacks = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    return max(stacks, key=len, default=nn.ModuleList())


def recompute(model: nn.Module, count: int) -> None:
    """Recompute the first `count` decoder layers, and no other; UserError where the model has
    fewer.

    The first ones, because they come last in the backward pass: what they compute again meets an
    empty memory.
    """
    layers: Any = decoder_layers(model)
    if count > len(layers):
        found = (
            f"has {len(layers)} decoder layers"
            if layers
            else "shows no decoder layers that can be recomputed"
        )
        raise UserError(
            f"runtime.recompute: {count} layers were asked for, but {type(model).__name__} {found}"
        )
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
