"""Seconds that a run will take, from the products it cannot avoid and the speed of such products on this machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from sftx.model.adapter import bare
from sftx.model.load import PackLoss
from sftx.model.recompute import decoder_layers

SHARE = 0.65
"""Of the speed of plain matrix products, what a whole step reaches (docs/performance.md)."""


def flops(loss: PackLoss, tokens: Any, targets: Any, squares: Any, recomputed: int = 0) -> Any:
    """FLOPs of `tokens` tokens with `targets` targets in segments whose squared lengths sum to `squares`;
    numbers, or arrays of them.

    Two per weight and token forward, two for the gradient of the input, two for that of a weight that trains; causal
    attention counts half of each square, 2 s^2 forward and twice that backward per layer and channel (PaLM,
    arXiv:2204.02311, appendix B, with the causal half). Experts count as if all were used.
    """
    layers, config = decoder_layers(loss.model), loss.model.config.get_text_config()
    body = sum(p.numel() * (6 if p.requires_grad else 4) for p in layers.parameters() if p.ndim >= 2)
    head = bare(loss.model.get_output_embeddings())
    once = sum(p.numel() for layer in list(layers)[:recomputed] for p in layer.parameters() if p.ndim >= 2)
    attention = 6 * len(layers) * config.hidden_size * squares
    return (
        (body + 2 * once) * tokens + (6 if head.weight.requires_grad else 4) * head.weight.numel() * targets + attention
    )


def product_speed(loss: PackLoss, device: torch.device, precision: torch.dtype, tokens: int, seconds: float) -> float:
    """FLOP/s of products [tokens, in] x [in, out] of the model's largest layer weight, over `seconds`."""
    shapes = [p.shape for p in decoder_layers(loss.model).parameters() if p.ndim == 2]
    wide, narrow = max(shapes, key=lambda s: s[0] * s[1], default=(1024, 1024))
    a, b = (
        torch.randn(*size, device=device, dtype=precision) for size in ((min(tokens, 4096), narrow), (narrow, wide))
    )
    done, start = 0, 0.0
    while done < 2 or time.perf_counter() - start < seconds:
        float((a @ b)[0, 0])  # waits for the device
        if not done:  # the first one warms up
            start = time.perf_counter()
        done += 1
    return (done - 1) * 2 * a.numel() * wide / (time.perf_counter() - start)
