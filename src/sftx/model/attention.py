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
from typing import Any, Literal

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
    # The formula of `cpu_attention`.
    window = _window(sliding_window, max_length_q)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    form = (scale, window, softcap or 0.0)
    query, key, value = _cast(query, key, value)
    kernel = _kernel(query, value, cu_seq_lens_q, softcap, s_aux, dropout)
    if prefix_index is not None:
        return _shared(query, key, value, s_aux, prefix_index, form, kernel, dropout), None
    if kernel == "flash":
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scale, window), None
    if kernel == "formula":
        return segments(query, key, value, s_aux, cu_seqlens_cpu, *form), None
    key = repeat_heads(key, query.shape[1])
    value = repeat_heads(value, query.shape[1])
    out = by_segment(query, key, value, s_aux, cu_seqlens_cpu, *form, dropout)
    return out.transpose(1, 2).contiguous(), None


def _window(given: int | None, longest: int) -> int:
    """The window that hides something of the longest segment, else 0."""
    return given if given and given < longest else 0


def _on_host(query: Tensor) -> bool:
    return query.device.type == "cpu" and not estimating_gpu


def _kernel(
    query: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Literal["flash", "formula", "autograd"]:
    """What computes segments that share nothing."""
    if dropout:
        return "autograd"
    if _on_host(query) or softcap or sinks is not None:
        return "formula"
    return "flash" if _flash_takes(query, value, cu_seqlens) else "autograd"


def _cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype that autocast asks for, or fp32 where they are of several; a CPU's kernel casts
    by itself.

    Rotary embeddings and norms leave fp32 behind; transformers' own kernels cast here as well.
    """
    dtype = query.dtype
    device = query.device.type
    if _on_host(query):
        return query, key, value
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif value.dtype != dtype:
        dtype = torch.float32
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    prefix_index: list[Tensor],
    form: tuple[float, int, float],
    kernel: str,
    dropout: float,
) -> Tensor:
    """Segments that share prefixes; `form` = scale, window, soft-cap. Flash attention computes the
    parts where it is the `kernel`, and there is no window.
    """
    if dropout:
        raise ValueError("attention drops keys, which segments with shared prefixes do not")
    flash = kernel == "flash" and not form[1]
    if flash and not _HAS_GROUPS:
        key = repeat_heads(key, query.shape[1])
        value = repeat_heads(value, query.shape[1])
    return shared_segments(query, key, value, sinks, prefix_index, *form, flash)


def repeat_heads(states: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: repeat key or value heads up to the number of query heads."""
    groups = heads // states.shape[1]
    if groups == 1:
        return states
    return states.repeat_interleave(groups, dim=1)


def _flash_takes(q: Tensor, v: Tensor, cu_seqlens: Tensor) -> bool:
    """What flash attention 2 computes. Its backward pass counts elements of a padded fp32 buffer in
    32 bits.
    """
    _, heads, tokens, size = q.shape
    padded_size = -(-size // 32) * 32
    padded_tokens = tokens + 128 * cu_seqlens.shape[0]
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    has_size = size == v.shape[3] and size % 8 == 0 and size <= 256
    return is_half and has_size and padded_tokens * heads * padded_size < 2**31


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    heads = q.shape[1]
    options: dict[str, Any] = {"scale": scale}
    if _HAS_GROUPS and heads != k.shape[1]:
        options["enable_gqa"] = True
    else:
        k = repeat_heads(k, heads)
        v = repeat_heads(v, heads)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, D]
    # (left, right): how many further positions are seen. (-1, 0) is plain causal attention.
    options["window_size"] = (window - 1, 0) if window else (-1, 0)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out[None]
