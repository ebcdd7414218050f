"""Attention inside segments: one function, registered with transformers under one name.

A pack is a flat stream; each token attends to itself and to what stands before it in its own segment. No mask of
T x T is ever built: transformers builds none for an attention it does not know, and here segments are cut by
`cu_seqlens`. Callers never choose a kernel:

* CUDA, half precision: `torch.nn.attention.varlen.varlen_attn`;
* CPU: torch's flash kernel segment by segment, as a custom op, so that a compiled layer stays one graph;
* anything else a model asks for (soft-capping, sinks, a window shorter than the segment, dropout): one segment at a
  time in plain PyTorch.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "sftx_segments"

_onednn_matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within segments, in the shape transformers calls: `query` [1, H, T, D], `key` and `value`
    [1, H_kv, T, D] -> ([1, T, H, D], None).

    `cu_seq_lens_q` int32[n + 1] are the segments' borders; `max_length_q` is the longest segment.
    Raises ValueError when called without them, so that no code path attends across segments unnoticed.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("segment attention was called without segments: the model does not pass them on")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    plain = softcap is None and s_aux is None and dropout == 0.0
    if query.is_cuda and plain and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scale, window), None
    key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    if plain and window is None and not query.is_cuda and query.shape[-1] == value.shape[-1]:
        return _cpu_segments(query, key, value, cu_seq_lens_q, scale)[0].transpose(1, 2).contiguous(), None
    parts = [
        _one_segment(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scale, dropout, window, softcap, s_aux)
        for a, b in _segments(cu_seq_lens_q)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, segment_attention)


def _repeat_heads(states: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: repeat key or value heads up to the number of query heads."""
    groups = heads // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, D]
    window_size = (-1 if window is None else window - 1, 0)
    options: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=window_size, **options
    )
    assert isinstance(out, Tensor)
    return out[None]


def _one_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Reference attention over one segment: [1, H, S, D] -> [1, H, S, D]."""
    length = q.shape[2]
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, scale=scale)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:  # a learned score per head that takes probability and gives nothing
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(1, -1, length, 1).to(scores.dtype)], dim=-1)
    probabilities = torch.softmax(scores.float(), dim=-1)[..., :length].to(q.dtype)
    return F.dropout(probabilities, dropout) @ v


@torch.library.custom_op("sftx::segments", mutates_args=())
def _cpu_segments(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Flash attention per segment on the CPU: [1, H, T, D] x 3 -> output in the dtype of `q`, and its log-sum-exp.

    Computed in fp32: for segments shorter than about 512 the bf16 kernel's backward is half as fast (measured).
    """
    _, heads, tokens, size = q.shape
    out = torch.zeros(1, tokens, heads, size, dtype=q.dtype)  # [1, T, H, D]: the layout the caller wants
    lse = torch.zeros(1, tokens, heads, dtype=torch.float32)
    with _full_precision_matmul():
        for a, b in _segments(cu_seqlens):
            part, part_lse = _flash(
                q[:, :, a:b].float(), k[:, :, a:b].float(), v[:, :, a:b].float(), 0.0, True, scale=scale
            )
            out[:, a:b] = part.transpose(1, 2)
            lse[:, a:b] = part_lse.transpose(1, 2)
    return out.transpose(1, 2), lse.transpose(1, 2)


@_cpu_segments.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _, heads, tokens, size = q.shape
    return (
        q.new_empty(1, tokens, heads, size).transpose(1, 2),
        q.new_empty(1, tokens, heads, dtype=torch.float32).transpose(1, 2),
    )


@torch.library.custom_op("sftx::segments_backward", mutates_args=())
def _cpu_segments_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with _full_precision_matmul():
        for a, b in _segments(cu_seqlens):
            s = slice(a, b)
            dq[:, :, s], dk[:, :, s], dv[:, :, s] = _flash_backward(
                *(x[:, :, s].float() for x in (grad, q, k, v, out)), lse[:, :, s], 0.0, True, scale=scale
            )
    return dq, dk, dv


@_cpu_segments_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[0], output[1], cu_seqlens)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    return (*_cpu_segments_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.scale), None, None)


_cpu_segments.register_autograd(_backward, setup_context=_save)


def _segments(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    borders = cu_seqlens.tolist()
    return [(a, b) for a, b in itertools.pairwise(borders) if b > a]


class _full_precision_matmul:
    """oneDNN's fp32 path, which `runtime` may switch on, is for large matrices; it slows the flash kernel's down."""

    def __enter__(self) -> None:
        self.before = _onednn_matmul.fp32_precision
        _onednn_matmul.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        _onednn_matmul.fp32_precision = self.before
