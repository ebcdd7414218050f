"""Attention as a formula, one segment at a time: for what no fused kernel computes.

    p = softmax(z),   z = softcap * tanh(scale * q k^T / softcap),   out = p v

Soft-capping (Gemma 2) and sinks (GPT-OSS: a learned score per head that takes probability and gives nothing) are one
custom op, so that a compiled layer stays one graph; its backward computes p again instead of keeping [S, S] of every
segment. Everything else, dropout above all, is left to autograd. `window` and `softcap` are 0 where there is none.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def segments_of(borders: Tensor) -> list[tuple[int, int]]:
    """(first, one past the last) of every segment; `borders` int32[n + 1] in the host's memory."""
    return [(a, b) for a, b in itertools.pairwise(borders.tolist()) if b > a]


def by_segment(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, borders: Tensor, scale: float, window: int, softcap: float,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Attention segment by segment, differentiable: [1, H, T, D] x 3 -> [1, H, T, D]."""
    parts = []
    for a, b in segments_of(borders):
        query, key, value = (x[:, :, a:b] for x in (q, k, v))
        if softcap or sinks is not None:
            p = _probabilities(query, key, sinks, scale, window, softcap)[0].to(v.dtype)
            parts.append(F.dropout(p, dropout) @ value)
        else:
            seen = _visible(query, window)
            parts.append(F.scaled_dot_product_attention(query, key, value, seen, dropout, scale=scale))
    return torch.cat(parts, dim=2)


def _visible(q: Tensor, window: int) -> Tensor:
    """Which key a query sees, bool[S, S]: itself and what stands before it, `window` positions in all."""
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < (window or q.shape[2]))


def _probabilities(
    q: Tensor, k: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """p [1, H, S, S], the sinks' share [1, H, S, 0 or 1], and z before masking; fp32."""
    z = (q @ k.transpose(-1, -2)).float() * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    scores = z.masked_fill(~_visible(q, window), float("-inf"))
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    p = torch.softmax(scores, dim=-1)
    return p[..., : q.shape[2]], p[..., q.shape[2] :], z


@torch.library.custom_op("sftx::capped_segments", mutates_args=())
def capped_segments(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, borders: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """Soft-capped attention or attention with `sinks` [H], per segment: [1, H, T, D] x 3 -> [1, H, T, D].

    `q`, `k` and `v` have one dtype and equally many heads; `borders` int32[n + 1] lies on the host.
    """
    with torch.autocast(q.device.type, enabled=False):
        return by_segment(q, k, v, sinks, borders, scale, window, softcap, 0.0)


@torch.library.custom_op("sftx::capped_segments_backward", mutates_args=())
def _capped_backward(
    grad: Tensor, qkv: list[Tensor], sinks: Tensor | None, borders: Tensor, scale: float, window: int, softcap: float
) -> list[Tensor]:
    """Gradients of q, k, v and, where there are any, of the sinks."""
    found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in qkv]
    d_sinks = torch.zeros(qkv[0].shape[1], device=grad.device)
    with torch.autocast(grad.device.type, enabled=False):
        for a, b in segments_of(borders):
            q, k, v, g = (x[:, :, a:b] for x in (*qkv, grad))
            p, sink, z = _probabilities(q, k, sinks, scale, window, softcap)
            dp = (g @ v.transpose(-1, -2)).float()
            mean = (p * dp).sum(-1, keepdim=True)
            dz = p * (dp - mean) * scale
            dz = (dz * (1 - (z / softcap) ** 2) if softcap else dz).to(q.dtype)
            d_sinks -= (sink * mean).sum((0, 2, 3))  # what a sink gives is 0, and so is its dp
            for total, part in zip(found, (dz @ k, dz.mT @ q, p.to(v.dtype).mT @ g), strict=True):
                total[:, :, a:b] = part
    return found if sinks is None else [*found, d_sinks.to(sinks.dtype)]


capped_segments.register_fake(lambda q, k, v, *_: v.new_empty(v.shape))
_capped_backward.register_fake(
    lambda grad, qkv, sinks, *_: [x.new_empty(x.shape) for x in (*qkv, *([] if sinks is None else [sinks]))]
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *qkv, sinks, borders = ctx.saved_tensors
    found = _capped_backward(grad, qkv, sinks, borders, *ctx.numbers)
    return *found[:3], None if sinks is None else found[3], None, None, None, None


capped_segments.register_autograd(_backward, setup_context=_save)
