"""Attention inside segments: one function, which `context_parallel` registers with transformers.

A pack is a flat stream; each token attends to itself and to what stands before it in its own
segment. No mask of T x T is ever built: transformers builds none for an attention it does not know,
and here segments are cut by `cu_seqlens`. Callers never choose a kernel:

* CUDA, half precision: `torch.nn.attention.varlen.varlen_attn`, flash attention as a custom op;
* CPU, soft-capping, sinks: `cpu_attention`, the formula as large products;
* segments that share prefixes: `prefix_attention`, parts of flash attention, merged, or such products;
* the rest (fp32 on CUDA, dropout, a head size that flash attention does not have): one segment at a time through
  PyTorch's own attention.

Whatever cuts segments on the host reads `cu_seqlens_cpu`, a copy of `cu_seqlens` that never left it: no
layer waits for the device.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from sftx.model.cpu_attention import by_segment, segments
from sftx.model.prefix_attention import shared_segments

NAME = "sftx_segments"
WITHOUT_SEGMENTS = "segment attention was called without segments: the model does not pass them on"
WITH_MASK = (
    "segment attention was called with a mask: the model hides or weighs keys in a way of its own"
)
estimating_gpu = (
    False  # set by `memory`, whose tensors without contents are on the CPU whatever they stand for
)

# Since torch 2.12 grouped-query attention has to be asked for; before, key and value heads are
# repeated.
_HAS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


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
    cu_seqlens_cpu: Tensor | None = None,
    prefix_index: list[Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within segments, in the shape transformers calls: `query` [1, H, T, D],
    `key` and `value` [1, H_kv, T, D] -> ([1, T, H, D], None).

    `cu_seq_lens_q` int32[n + 1] are where segments begin and end, `cu_seqlens_cpu` the same on the
    host; `max_length_q` is at least the longest segment, with its ancestors. `prefix_index`: see
    `shared_segments`. Raises ValueError when called without segments, so that no code path attends
    across them unnoticed.
    """
    if cu_seq_lens_q is None or max_length_q is None or cu_seqlens_cpu is None:
        raise ValueError(WITHOUT_SEGMENTS)
    # Transformers makes none for this attention: it is the model's own, for itself.
    if attention_mask is not None:
        raise ValueError(WITH_MASK)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = sliding_window if sliding_window and sliding_window < max_length_q else 0
    plain = not softcap and s_aux is None and dropout == 0.0
    on_host = query.device.type == "cpu" and not estimating_gpu
    if not on_host and torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings and norms leave fp32 behind under autocast; transformers' own kernels
        # cast here as well.
        query, key, value = (
            x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value)
        )
    flash = plain and not on_host and _flash_takes(query, value, cu_seq_lens_q)
    if flash and prefix_index is None:
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scale, window), None
    if not on_host and query.dtype != value.dtype:
        query, key, value = query.float(), key.float(), value.float()
    if prefix_index is not None:
        numbers = (scale, window, softcap or 0.0, flash and not window)
        return _shared(query, key, value, s_aux, prefix_index, numbers, dropout), None
    if dropout == 0.0 and (on_host or not plain):
        return segments(
            query, key, value, s_aux, cu_seqlens_cpu, scale, window, softcap or 0.0
        ), None
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    out = by_segment(
        query, key, value, s_aux, cu_seqlens_cpu, scale, window, softcap or 0.0, dropout
    )
    return out.transpose(1, 2).contiguous(), None


def _shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    prefix_index: list[Tensor],
    numbers: tuple[float, int, float, bool],
    dropout: float,
) -> Tensor:
    """Segments that share prefixes; `numbers` = scale, window, soft-cap, and whether flash attention
    computes the parts.
    """
    if dropout:
        raise ValueError("attention drops keys, which segments with shared prefixes do not")
    if numbers[-1] and not _HAS_GROUPS:
        key = repeat_heads(key, query.shape[1])
        value = repeat_heads(value, query.shape[1])
    return shared_segments(query, key, value, sinks, prefix_index, *numbers)


def repeat_heads(states: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: repeat key or value heads up to the number of query heads."""
    groups = heads // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _flash_takes(q: Tensor, v: Tensor, cu_seqlens: Tensor) -> bool:
    """What flash attention 2 computes. Its backward pass counts elements of a padded fp32 buffer in
    32 bits.
    """
    tokens, heads, size = q.shape[2], q.shape[1], q.shape[3]
    padded = (tokens + 128 * cu_seqlens.shape[0]) * heads * (-(-size // 32) * 32)
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and size == v.shape[3] and size % 8 == 0 and size <= 256 and padded < 2**31


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    groups: dict[str, Any] = (
        {"enable_gqa": True} if _HAS_GROUPS and q.shape[1] != k.shape[1] else {}
    )
    if not groups:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, D]
    # (left, right): how many further positions are seen. (-1, 0) is plain causal attention.
    size = (window - 1 if window else -1, 0)
    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=size, **groups
    )
    assert isinstance(out, Tensor)
    return out[None]
