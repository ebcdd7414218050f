"""Attention over segments that share prefixes.

A segment sees itself causally and its ancestors whole. `prefix_blocks` computes this in one go. Flash
attention (CUDA in half precision, without windows, soft-capping and sinks) takes it in parts, which
are merged by their log-sum-exp.

A token has at most one ancestor at each depth. So a pack takes one part for all segments with
themselves, and one for each depth: its ancestors with the queries of all that continue them. These
are few and large calls. A part gives its output o and l = logsumexp(z), and parts make the whole
(arXiv:2310.01889, section 3):

    l = log(sum_i exp(l_i)),   out = sum_i exp(l_i - l) o_i

Going backward a part is given the whole's `out` and l. Its p = exp(z - l) are then probabilities
among all keys, d_z = p * (d_p - sum(grad * out)) is exact, and the parts' gradients add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sftx.model.prefix_blocks import shared_blocks
from sftx.model.prefix_index import Part, parts_of


def shared_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    index: list[Tensor],
    scale: float,
    window: int,
    softcap: float,
    flash: bool,
) -> Tensor:
    """`q` [1, H, T, D], `k` and `v` [1, H_kv, T, D or D_v], `sinks` [H] -> [1, T, H, D_v] in the
    dtype of `q`.

    `index`: see `shared_blocks`. With `flash` there are no sinks, window and soft-capping.
    """
    if not flash:
        return shared_blocks(q, k, v, sinks, index, scale, window, softcap)
    out, _ = shared_flash(q, k, v, index, scale)
    return out


@torch.library.custom_op("sftx::shared_flash", mutates_args=())
def shared_flash(
    q: Tensor, k: Tensor, v: Tensor, index: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of all scores of each query, float64[T, H]."""
    query, key, value = (x[0].transpose(0, 1) for x in (q, k, v))
    own, *of_depths = parts_of(index)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _flash_forward(query, key, value, own, scale)
        out = out.float()
        lse = lse.double()
        for part in of_depths:
            queries = part.queries
            assert queries is not None
            more, more_lse = _flash_forward(query, key, value, part, scale)
            old = lse.index_select(0, queries)
            new = torch.logaddexp(old, more_lse.double())
            kept = (old - new).exp().float()[..., None]
            added = (more_lse - new).exp().float()[..., None]
            merged = out.index_select(0, queries).mul_(kept).addcmul_(more, added)
            out.index_copy_(0, queries, merged)
            lse.index_copy_(0, queries, new)
    return out[None].to(q.dtype), lse


@torch.library.custom_op("sftx::shared_flash_backward", mutates_args=())
def _shared_flash_backward(
    grad: Tensor, qkv: list[Tensor], out: Tensor, lse: Tensor, index: list[Tensor], scale: float
) -> list[Tensor]:
    """Gradients of q, k and v."""
    query, key, value = (x[0].transpose(0, 1) for x in qkv)
    totals = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
    d_q, d_k, d_v = totals
    with torch.autocast(grad.device.type, enabled=False):
        for part in parts_of(index):
            more_q, more_k, more_v = _flash_backward(
                grad[0], out[0], lse, query, key, value, part, scale
            )
            _add(d_q, part.queries, more_q)
            _add(d_k, part.keys, more_k)
            _add(d_v, part.keys, more_v)
    by_head = [total.transpose(0, 1)[None] for total in totals]
    return [total.to(x.dtype).contiguous() for total, x in zip(by_head, qkv, strict=True)]


@shared_flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
    lse = q.new_empty(q.shape[2], q.shape[1], dtype=torch.float64)
    return out, lse


@_shared_flash_backward.register_fake
def _(grad: Tensor, qkv: list[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in qkv]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, *index)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    q, k, v, out, lse, *index = ctx.saved_tensors
    d_q, d_k, d_v = _shared_flash_backward(grad, [q, k, v], out, lse, index, ctx.scale)
    of_index = [None for _ in index]
    return d_q, d_k, d_v, of_index, None


shared_flash.register_autograd(_backward, setup_context=_save)


def _at(x: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return x
    return x.index_select(0, rows)


def _add(total: Tensor, rows: Tensor | None, more: Tensor) -> None:
    """Add to these rows, none of which is named twice; in place."""
    if rows is None:
        total += more
    else:
        total.index_add_(0, rows, more.to(total.dtype))


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float
) -> tuple[Tensor, Tensor]:
    """One part of [T, H, D] and [T, H_kv, D] twice -> its output, and its log-sum-exp [q, H]."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        _at(q, part.queries),
        _at(k, part.keys),
        _at(v, part.keys),
        part.cu_q,
        part.cu_k,
        *part.longest(),
        0.0,
        part.causal,
        False,
        scale=scale,
    )
    return out, lse.t()


def _flash_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    part: Part,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the part's q, k and v, given `grad`, `out` and `lse` of the whole."""
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        _at(grad, part.queries).contiguous(),
        _at(q, part.queries),
        _at(k, part.keys),
        _at(v, part.keys),
        _at(out, part.queries).contiguous(),
        _at(lse, part.queries).t().float().contiguous(),
        part.cu_q,
        part.cu_k,
        *part.longest(),
        0.0,
        part.causal,
        state,
        unused,
        scale=scale,
    )
