"""Attention as matrix products, segment by segment and a block of queries at a time: the CPU's
kernel, and, on every device, that of soft-capping (Gemma 2) and sinks (GPT-OSS: a learned score per
head that takes probability and gives nothing).

z = softcap * tanh(scale * q k^T / softcap),   p = softmax([z, sink]) without the sink,   out = p v

Heads that share keys are rows of one product. The keys of a block begin with its window and end
with its last query, so what is hidden is hardly computed, and memory grows with the length, not
with its square. One custom op, so that a compiled layer stays one graph; its backward computes p
again. A CPU computes in fp32, and of fp64 in fp64. `window` and `softcap` are 0 where there is
none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128
"""Queries of a block; 8 times as many on a GPU."""
FILL = 32
"""A CPU's segments are filled up to multiples of so many tokens: oneDNN prepares its code anew for
every shape.
"""


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp64 where it is so already, else in fp32."""
    if x.dtype == torch.float64:
        return x
    return x.float()


def segments_of(cu_seqlens_cpu: Tensor) -> list[tuple[int, int]]:
    """(first, one past the last) of every segment; `cu_seqlens_cpu` int32[n + 1] in the host's memory."""
    return [(a, b) for a, b in itertools.pairwise(cu_seqlens_cpu.tolist()) if b > a]


def by_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_cpu: Tensor,
    scale: float,
    window: int,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Attention left to autograd, with dropout, segment by segment.

    Shapes: [1, H, T, D] three times, to [1, H, T, D].
    """
    parts = []
    for a, b in segments_of(cu_seqlens_cpu):
        length = b - a
        query = q[:, :, a:b]
        key = k[:, :, a:b]
        value = v[:, :, a:b]
        if softcap or sinks is not None:
            whole = slice(0, length)
            scaled = query[0] * scale
            p = _probabilities(scaled, key[0], sinks, whole, whole, window, softcap)[0]
            part = F.dropout(p[None].to(v.dtype), dropout) @ value
        else:
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
            seen = seen.tril().triu(1 - (window or length))
            part = F.scaled_dot_product_attention(query, key, value, seen, dropout, scale=scale)
        parts.append(part)
    return torch.cat(parts, dim=2)


@torch.library.custom_op("sftx::segments", mutates_args=())
def segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_cpu: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """`q` [1, H, T, D], `k` and `v` [1, H_kv, T, D or D_v], `sinks` [H] -> [1, T, H, D_v] in the
    dtype of `q`.

    `cu_seqlens_cpu` int32[n + 1] lies on the host; on a GPU `q`, `k` and `v` have one dtype.
    """
    heads = q.shape[1]
    width = v.shape[3]
    out = q.new_zeros(1, q.shape[2], heads, width)
    with torch.autocast(q.device.type, enabled=False):
        for a, b in segments_of(cu_seqlens_cpu):
            queries, keys, values = _cut(a, b, q, k, v)
            length = keys.shape[1]
            whole = torch.empty(length, heads, width, dtype=keys.dtype, device=q.device)
            for rows, seen in _blocks(length, window, q):
                p = _probabilities(
                    queries[:, :, rows].flatten(1, 2) * scale,
                    keys[:, seen],
                    sinks,
                    rows,
                    seen,
                    window,
                    softcap,
                )[0]
                part = torch.bmm(p.to(values.dtype), values[:, seen])
                whole[rows] = part.view(heads, -1, width).transpose(0, 1)
            out[0, a:b] = whole[: b - a]
    return out


@torch.library.custom_op("sftx::segments_backward", mutates_args=())
def _segments_backward(
    grad: Tensor,
    qkv: list[Tensor],
    sinks: Tensor | None,
    cu_seqlens_cpu: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> list[Tensor]:
    """Gradients of q, k, v and, where there are any, of the sinks."""
    found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in qkv]
    d_sinks = at_least_fp32(grad.new_zeros(qkv[0].shape[1]))
    with torch.autocast(grad.device.type, enabled=False):
        for a, b in segments_of(cu_seqlens_cpu):
            queries, keys, values = _cut(a, b, *qkv)
            grads = _cut(a, b, grad.transpose(1, 2), *qkv[1:])[0]
            d_q = torch.empty_like(queries)
            d_k = torch.zeros_like(keys)
            d_v = torch.zeros_like(values)
            for rows, seen in _blocks(keys.shape[1], window, grad):
                block = queries[:, :, rows].flatten(1, 2) * scale
                g = grads[:, :, rows].flatten(1, 2)
                p, slope, sink = _probabilities(
                    block, keys[:, seen], sinks, rows, seen, window, softcap
                )
                d_p = at_least_fp32(torch.bmm(g, values[:, seen].mT))
                d_z = of_scores(d_p, p, slope, sink, d_sinks).to(keys.dtype)
                # Neither in a name of its own, which would keep memory into the next segment.
                d_q[:, :, rows] = torch.bmm(d_z, keys[:, seen]).mul_(scale).view_as(d_q[:, :, rows])
                d_k[:, seen] += torch.bmm(d_z.mT, block)
                d_v[:, seen] += torch.bmm(p.to(g.dtype).mT, g)
            for total, part in zip(found, (d_q, d_k, d_v), strict=True):
                total[0, :, a:b] = part.view(-1, *part.shape[-2:])[:, : b - a]
    if sinks is not None:
        found.append(d_sinks.to(sinks.dtype))
    return found


def of_scores(
    d_p: Tensor, p: Tensor, slope: Tensor | None, sink: Tensor | None, d_sinks: Tensor
) -> Tensor:
    """The gradient of the scores before soft-capping, from `d_p`, that of the probabilities `p`; that
    of the sinks, float[H], is added to `d_sinks` in place.
    """
    if sink is not None:  # what a sink gives is 0, and so is its d_p
        pull = sink * (p * d_p).sum(-1, keepdim=True)
        d_sinks -= pull.view(len(d_sinks), -1).sum(1)
    d_z = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
    if slope is None:
        return d_z
    return d_z * slope


segments.register_fake(lambda q, k, v, *_: q.new_empty(1, q.shape[2], q.shape[1], v.shape[3]))


@_segments_backward.register_fake
def _(grad: Tensor, qkv: list[Tensor], sinks: Tensor | None, *_: object) -> list[Tensor]:
    given = qkv if sinks is None else [*qkv, sinks]
    return [x.new_empty(x.shape) for x in given]


def _save(ctx: Any, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *qkv, sinks, cu_seqlens_cpu = ctx.saved_tensors
    found = _segments_backward(grad, qkv, sinks, cu_seqlens_cpu, *ctx.numbers)
    numbers = [None] * (8 - len(found))
    return *found, *numbers


segments.register_autograd(_backward, setup_context=_save)


def _cut(a: int, b: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One segment: queries [H_kv, G, S, D], where G heads share keys; keys and values [H_kv, S, D]."""
    parts = [x[0, :, a:b] for x in (q, k, v)]
    # What is filled up comes last, where no query of the segment sees it.
    if q.device.type == "cpu":
        missing = (a - b) % FILL
        parts = [F.pad(at_least_fp32(x), (0, 0, 0, missing)) for x in parts]
    query, key, value = parts
    by_key_head = query.unflatten(0, (k.shape[1], -1))
    return by_key_head, key.contiguous(), value.contiguous()


def _blocks(length: int, window: int, like: Tensor) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that some of them see)."""
    step = ROWS
    if like.device.type != "cpu":
        step *= 8
    for a in range(0, length, step):
        b = min(a + step, length)
        first = 0
        if window:
            first = max(0, a - window + 1)
        yield slice(a, b), slice(first, b)


def _probabilities(
    queries: Tensor,
    keys: Tensor,
    sinks: Tensor | None,
    rows: slice,
    seen: slice,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """p [H_kv, G x rows, keys] in at least fp32, of `queries` already scaled; the slope of
    soft-capping; the sinks' share.
    """
    z, slope = scores(queries, keys, softcap)
    count = rows.stop - rows.start
    before = rows.start - seen.start
    by_row = z.unflatten(1, (-1, count))
    hidden = z.new_full((count, z.shape[2]), float("-inf"))
    by_row[..., before:].add_(hidden[:, -count:].triu(1))
    if window and before + count > window:
        by_row.add_(hidden.tril(before - window))
    if sinks is None:
        return torch.softmax(z, -1), slope, None
    by_head = sinks.to(z.dtype).view(len(z), -1, 1)
    column = by_head.expand(-1, -1, count).reshape(len(z), -1, 1)
    p = torch.softmax(torch.cat([z, column], -1), -1)
    return p[..., :-1].contiguous(), slope, p[..., -1:]


def scores(queries: Tensor, keys: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """z [H_kv, G x rows, keys] in at least fp32, of `queries` already scaled, and the slope of
    soft-capping.
    """
    z = at_least_fp32(torch.bmm(queries, keys.mT))
    if not softcap:
        return z, None
    z = torch.tanh(z / softcap)
    slope = 1 - z**2
    return z * softcap, slope
