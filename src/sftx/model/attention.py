"""Attention inside segments: one function, which `context_parallel` registers with transformers.

A pack is a flat stream; each token attends to itself and to what stands before it in its own
segment. No mask of T x T is ever built: transformers builds none for an attention it does not know,
and here segments are cut by `cu_seqlens`. Callers never choose a kernel:

* CUDA, half precision: `torch.nn.attention.varlen.varlen_attn`, flash attention as a custom op;
* CPU, soft-capping, sinks: `cpu_attention`, the formula as large products;
* segments that share prefixes: `prefix_attention`, which merges parts of flash attention or of such products;
* the rest (fp32 on CUDA, dropout, a head size that flash attention does not have): one segment at a time through
  PyTorch's own attention.

Whatever cuts segments on the host reads `cu_seqlens_cpu`, a copy of `cu_seqlens` that never left it: no
layer waits for the device.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

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


class _Form(NamedTuple):
    """The formula of `cpu_attention`; `window` and `softcap` are 0 where there is none."""

    scale: float
    window: int
    softcap: float


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
    form = _form(query, scaling, sliding_window, max_length_q, softcap)
    query, key, value = _under_autocast(query, key, value)
    is_plain = _is_plain(form.softcap, s_aux, dropout)
    flash = is_plain and not _on_host(query) and _flash_takes(query, value, cu_seq_lens_q)
    if flash and prefix_index is None:
        longest = max_length_q
        out = _varlen(query, key, value, cu_seq_lens_q, longest, form.scale, form.window)
        return out, None
    query, key, value = _of_one_dtype(query, key, value)
    if prefix_index is not None:
        return _shared(query, key, value, s_aux, prefix_index, form, flash, dropout), None
    return _alone(query, key, value, s_aux, cu_seqlens_cpu, form, dropout), None


def _form(
    query: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    longest: int,
    softcap: float | None,
) -> _Form:
    """The formula, from the arguments that transformers gives."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = 0
    if sliding_window and sliding_window < longest:
        window = sliding_window
    return _Form(scale, window, softcap or 0.0)


def _on_host(query: Tensor) -> bool:
    return query.device.type == "cpu" and not estimating_gpu


def _is_plain(softcap: float, sinks: Tensor | None, dropout: float) -> bool:
    """Whether it is the softmax of the scores and nothing more."""
    return not softcap and sinks is None and dropout == 0.0


def _under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as autocast would, on a GPU.

    Rotary embeddings and norms leave fp32 behind; transformers' own kernels cast here as well.
    """
    device = query.device.type
    if _on_host(query) or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32 where they are of several dtypes; a CPU's kernel casts by itself."""
    if _on_host(query) or query.dtype == value.dtype:
        return query, key, value
    return query.float(), key.float(), value.float()


def _alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens_cpu: Tensor,
    form: _Form,
    dropout: float,
) -> Tensor:
    """Segments that share nothing, and that flash attention does not take."""
    is_plain = _is_plain(form.softcap, sinks, dropout)
    if dropout == 0.0 and (_on_host(query) or not is_plain):
        return segments(query, key, value, sinks, cu_seqlens_cpu, *form)
    heads = query.shape[1]
    key = repeat_heads(key, heads)
    value = repeat_heads(value, heads)
    out = by_segment(query, key, value, sinks, cu_seqlens_cpu, *form, dropout)
    return out.transpose(1, 2).contiguous()


def _shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    prefix_index: list[Tensor],
    form: _Form,
    flash: bool,
    dropout: float,
) -> Tensor:
    """Segments that share prefixes; `flash`: whether flash attention computes those parts that
    have no window.
    """
    if dropout:
        raise ValueError("attention drops keys, which segments with shared prefixes do not")
    flash = flash and not form.window
    if flash and not _HAS_GROUPS:
        key = repeat_heads(key, query.shape[1])
        value = repeat_heads(value, query.shape[1])
    out, _ = shared_segments(query, key, value, sinks, prefix_index, *form, flash)
    return out


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
