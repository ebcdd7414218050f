"""Attention inside segments: one function, registered with transformers under one name.

A pack is a flat stream; each token attends to itself and to what stands before it in its own segment. No mask of
T x T is ever built: transformers builds none for an attention it does not know, and here segments are cut by
`cu_seqlens`. Callers never choose a kernel:

* CUDA, half precision: `torch.nn.attention.varlen.varlen_attn`, flash attention as a custom op;
* CPU: torch's flash kernel segment by segment, as a custom op, so that a compiled layer stays one graph;
* soft-capping or sinks: `capped`, the formula itself as a custom op;
* the rest (fp32 on CUDA, dropout, a head size that flash attention does not have): one segment at a time through
  PyTorch's own attention.

Whatever cuts segments on the host reads `borders`, a copy of `cu_seqlens` that never left it: no layer waits for the
device.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from sftx.model.capped import by_segment, capped_segments, segments_of

NAME = "sftx_segments"
rehearsing_gpu = False  # set by `memory`, whose tensors without contents are on the CPU whatever they stand for

# Since torch 2.12 grouped-query attention has to be asked for; before, key and value heads are repeated.
_HAS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
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
    borders: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within segments, in the shape transformers calls: `query` [1, H, T, D], `key` and `value`
    [1, H_kv, T, D] -> ([1, T, H, D], None).

    `cu_seq_lens_q` int32[n + 1] are the segments' borders, `borders` the same on the host; `max_length_q` is at least
    the longest segment. Raises ValueError when called without them, so that no code path attends across segments
    unnoticed.
    """
    if cu_seq_lens_q is None or max_length_q is None or borders is None:
        raise ValueError("segment attention was called without segments: the model does not pass them on")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = sliding_window if sliding_window and sliding_window < max_length_q else 0
    plain = not softcap and s_aux is None and dropout == 0.0
    on_host = query.device.type == "cpu" and not rehearsing_gpu
    if not on_host and torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings and norms leave fp32 behind under autocast; transformers' own kernels cast here as well.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if plain and not on_host and _flash_takes(query, value, cu_seq_lens_q):
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scale, window), None
    if plain and on_host and query.shape[-1] == value.shape[-1]:
        return _cpu_segments(query, key, value, borders, scale, window)[0].transpose(1, 2).contiguous(), None
    key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    if query.dtype != value.dtype:
        query, key, value = query.float(), key.float(), value.float()
    if dropout == 0.0 and not plain:
        out = capped_segments(query, key, value, s_aux, borders, scale, window, softcap or 0.0)
    else:
        out = by_segment(query, key, value, s_aux, borders, scale, window, softcap or 0.0, dropout)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, segment_attention)


def _repeat_heads(states: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: repeat key or value heads up to the number of query heads."""
    groups = heads // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _flash_takes(q: Tensor, v: Tensor, cu_seqlens: Tensor) -> bool:
    """What flash attention 2 computes. Its backward pass counts elements of a padded fp32 buffer in 32 bits."""
    tokens, heads, size = q.shape[2], q.shape[1], q.shape[3]
    padded = (tokens + 128 * cu_seqlens.shape[0]) * heads * (-(-size // 32) * 32)
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and size == v.shape[3] and size % 8 == 0 and size <= 256 and padded < 2**31


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int) -> Tensor:
    groups: dict[str, Any] = {"enable_gqa": True} if _HAS_GROUPS and q.shape[1] != k.shape[1] else {}
    if not groups:
        k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, D]
    # (left, right): how many further positions are seen. (-1, 0) is plain causal attention.
    size = (window - 1 if window else -1, 0)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=size, **groups)
    assert isinstance(out, Tensor)
    return out[None]


@torch.library.custom_op("sftx::segments", mutates_args=())
def _cpu_segments(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """Flash attention per segment on the CPU: `q` [1, H, T, D], `k` and `v` [1, H_kv, T, D] -> output in the dtype of
    `q`, and its log-sum-exp.

    Computed in fp32: for segments shorter than about 512 the bf16 kernel's backward is half as fast (measured).
    Heads of keys and values are repeated for one segment at a time, and never kept.
    """
    _, heads, tokens, size = q.shape
    out = torch.zeros(1, tokens, heads, size, dtype=q.dtype)  # [1, T, H, D]: the layout the caller wants
    lse = torch.zeros(1, tokens, heads, dtype=torch.float32)
    with _full_precision_matmul():
        for a, b in segments_of(borders):
            inputs = [_repeat_heads(x[:, :, a:b].float(), heads) for x in (q, k, v)]
            part, part_lse = _flash(*inputs, 0.0, True, attn_mask=_outside(window, b - a), scale=scale)
            out[:, a:b] = part.transpose(1, 2)
            lse[:, a:b] = part_lse.transpose(1, 2)
    return out.transpose(1, 2), lse.transpose(1, 2)


@_cpu_segments.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _, heads, tokens, size = q.shape
    out, lse = q.new_empty(1, tokens, heads, size), q.new_empty(1, tokens, heads, dtype=torch.float32)
    return out.transpose(1, 2), lse.transpose(1, 2)


@torch.library.custom_op("sftx::segments_backward", mutates_args=())
def _cpu_segments_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)]
    with _full_precision_matmul():
        for a, b in segments_of(borders):
            s, mask = slice(a, b), _outside(window, b - a)
            inputs = [_repeat_heads(x[:, :, s].float(), q.shape[1]) for x in (grad, q, k, v, out)]
            parts = _flash_backward(*inputs, lse[:, :, s], 0.0, True, attn_mask=mask, scale=scale)
            for total, part in zip(gradients, parts, strict=True):
                total[:, :, s] = part.unflatten(1, (total.shape[1], -1)).sum(2)  # over the heads that share one
    return gradients[0], gradients[1], gradients[2]


_cpu_segments_backward.register_fake(lambda grad, *qkv: tuple(torch.empty_like(x) for x in qkv[:3]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, borders, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, borders)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_cpu_segments_backward(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None)


_cpu_segments.register_autograd(_backward, setup_context=_save)


def _outside(window: int, length: int) -> Tensor | None:
    """Additive mask [S, S] that hides what stands before the window of a position; None where nothing does."""
    if not window or window >= length:
        return None
    return torch.full((length, length), float("-inf")).tril(-window)


class _full_precision_matmul:
    """oneDNN's fp32 path, which `runtime` may switch on, is for large matrices; it slows the flash kernel's down."""

    def __enter__(self) -> None:
        self.before = _onednn_matmul.fp32_precision
        _onednn_matmul.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        _onednn_matmul.fp32_precision = self.before
