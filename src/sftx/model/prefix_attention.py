"""Attention over segments that share prefixes, as parts that are merged by their log-sum-exp.

A segment sees itself causally and its ancestors whole. A token has at most one ancestor at each
depth, so that a pack takes one part for all segments with themselves, and one for each depth: its
ancestors with the queries of all that continue them, few and large products. A part gives its
output o and l = logsumexp(z), and parts make the whole (arXiv:2310.01889, section 3):

    l = log(sum_i exp(l_i)),   out = sum_i exp(l_i - l) o_i

Going backward a part is given the whole's `out` and l. Its p = exp(z - l) are then probabilities
among all keys, d_z = p * (d_p - sum(grad * out)) is exact, and the parts' gradients add up. A sink is
a part of one key whose value is 0.

A part is computed by flash attention (CUDA in half precision, without windows, soft-capping and
sinks), or by blocks of matrix products, with all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sftx.model.cpu_attention import FILL, ROWS, at_least_fp32, scores
from sftx.model.prefix_index import Part, parts_of

UNSEEN = float("-inf")


@dataclass(frozen=True, slots=True)
class _Rule:
    """How scores are made. `positions` int64[T] of the tokens of the pack; `window` and `softcap`
    are 0 where there is none.
    """

    positions: Tensor
    scale: float
    window: int
    softcap: float


@torch.library.custom_op("sftx::shared_segments", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """`q` [1, H, T, D], `k` and `v` [1, H_kv, T, D or D_v], `sinks` [H] -> [1, T, H, D_v] in the
    dtype of `q`, and the log-sum-exp of all scores of each query, float64[T, H].

    `index` = int64[T] positions, then what `prefix_index` returns, its bounds twice: on the device
    and on the host, where the table is too.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    rule = _Rule(index[0], scale, window, softcap)
    forward = _flash_forward if flash else _blocks_forward
    out = lse = q.new_empty(0)
    with torch.autocast(q.device.type, enabled=False):
        for part in parts_of(index):
            more, more_lse = forward(
                _at(q, part.queries), _at(k, part.keys), _at(v, part.keys), part, rule
            )
            if part.queries is None:
                out, lse = at_least_fp32(more), more_lse.double()
                continue
            old = lse.index_select(0, part.queries)
            new = torch.logaddexp(old, more_lse.double())
            kept, added = ((x - new).exp().to(out.dtype)[..., None] for x in (old, more_lse))
            merged = out.index_select(0, part.queries).mul_(kept).addcmul_(more, added)
            out.index_copy_(0, part.queries, merged)
            lse.index_copy_(0, part.queries, new)
        if sinks is not None:
            old, lse = lse, torch.logaddexp(lse, sinks.double())
            out *= (old - lse).exp().to(out.dtype)[..., None]
    return out[None].to(q.dtype), lse


@torch.library.custom_op("sftx::shared_segments_backward", mutates_args=())
def _shared_segments_backward(
    grad: Tensor,
    qkv: list[Tensor],
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    index: list[Tensor],
    scale: float,
    window: int,
    softcap: float,
    flash: bool,
) -> list[Tensor]:
    """Gradients of q, k, v and, where there are any, of the sinks."""
    grad, out = grad[0], out[0]
    q, k, v = (x[0].transpose(0, 1) for x in qkv)
    rule = _Rule(index[0], scale, window, softcap)
    backward = _flash_backward if flash else _blocks_backward
    totals = [torch.zeros_like(x, dtype=at_least_fp32(x[:0]).dtype) for x in (q, k, v)]
    with torch.autocast(grad.device.type, enabled=False):
        for part in parts_of(index):
            found = backward(
                _at(grad, part.queries),
                _at(out, part.queries),
                _at(lse, part.queries),
                _at(q, part.queries),
                _at(k, part.keys),
                _at(v, part.keys),
                part,
                rule,
            )
            for total, more in zip(totals, found, strict=True):
                rows = part.queries if total is totals[0] else part.keys
                _add(total, rows, more)
    gradients = [
        total.transpose(0, 1)[None].to(x.dtype).contiguous()
        for total, x in zip(totals, qkv, strict=True)
    ]
    if sinks is None:
        return gradients
    delta = (at_least_fp32(grad) * out).sum(-1)
    d_sinks = -((sinks.double() - lse).exp() * delta).sum(0)
    return [*gradients, d_sinks.to(sinks.dtype)]


shared_segments.register_fake(
    lambda q, k, v, *_: (
        q.new_empty(1, q.shape[2], q.shape[1], v.shape[3]),
        q.new_empty(q.shape[2], q.shape[1], dtype=torch.float64),
    )
)
_shared_segments_backward.register_fake(
    lambda grad, qkv, out, lse, sinks, *_: [
        x.new_empty(x.shape) for x in (*qkv, *([] if sinks is None else [sinks]))
    ]
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, index, *ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, sinks, *output, *index)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    q, k, v, sinks, out, lse, *index = ctx.saved_tensors
    found = _shared_segments_backward(grad, [q, k, v], out, lse, sinks, index, *ctx.numbers)
    d_sinks = None if sinks is None else found[3]
    return *found[:3], d_sinks, [None for _ in index], None, None, None, None


shared_segments.register_autograd(_backward, setup_context=_save)


def _at(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _add(total: Tensor, rows: Tensor | None, more: Tensor) -> None:
    """Add to these rows, none of which is named twice; in place."""
    if rows is None:
        total += more
    else:
        total.index_add_(0, rows, more.to(total.dtype))


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, part: Part, rule: _Rule
) -> tuple[Tensor, Tensor]:
    """One part: [q, H, D], [k, H_kv, D] twice -> its output, and its log-sum-exp [q, H]."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, part.cu_q, part.cu_k, *part.longest(), 0.0, part.causal, False, scale=rule.scale
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
    rule: _Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the part's q, k and v, given the `out` and `lse` of the whole."""
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(),
        q,
        k,
        v,
        out.contiguous(),
        lse.t().float().contiguous(),
        part.cu_q,
        part.cu_k,
        *part.longest(),
        0.0,
        part.causal,
        state,
        unused,
        scale=rule.scale,
    )


def _blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, part: Part, rule: _Rule
) -> tuple[Tensor, Tensor]:
    """What `_flash_forward` returns, in at least fp32; the log-sum-exp in fp64."""
    out = q.new_zeros(len(q), q.shape[1], v.shape[2], dtype=at_least_fp32(q[:0]).dtype)
    lse = q.new_full(q.shape[:2], UNSEEN, dtype=torch.float64)
    for block in _blocks(q, k, v, part, rule):
        top, p = block.z.amax(-1), torch.softmax(block.z, -1)
        found = top.double() - p.amax(-1).double().log()
        if rule.window:  # where a query sees nothing of its ancestor
            found.masked_fill_(top == UNSEEN, UNSEEN)
            p.masked_fill_((top == UNSEEN)[..., None], 0.0)
        out[block.rows] = block.by_query(torch.bmm(p.to(block.values.dtype), block.values))
        lse[block.rows] = block.by_query(found[..., None])[..., 0]
    return out, lse


def _blocks_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    part: Part,
    rule: _Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_flash_backward` returns, in at least fp32."""
    d_q = torch.zeros_like(q, dtype=at_least_fp32(q[:0]).dtype)
    d_k, d_v = (x.new_zeros(x.shape[1], len(x), x.shape[2], dtype=d_q.dtype) for x in (k, v))
    # exp(z - lse) is p * exp(rounded - lse): what rounding changes is made good in the gradient.
    rounded = lse.to(d_q.dtype)
    grad = at_least_fp32(grad) * (rounded.double() - lse).exp().to(d_q.dtype)[..., None]
    delta = (grad * out).sum(-1)
    for block in _blocks(q, k, v, part, rule):
        g = block.by_key_head(grad).to(block.values.dtype)
        shift, level = (block.by_key_head(x[..., None]) for x in (rounded, delta))
        p = block.z.sub_(shift).exp_()
        d_z = at_least_fp32(torch.bmm(g, block.values.mT)).sub_(level).mul_(p)
        d_z = (d_z if block.slope is None else d_z * block.slope).to(block.keys.dtype)
        d_q[block.rows] = block.by_query(torch.bmm(d_z, block.keys)).mul_(rule.scale)
        size = block.seen.stop - block.seen.start
        d_k[:, block.seen] += torch.bmm(d_z.mT, block.queries)[:, :size]
        d_v[:, block.seen] += torch.bmm(p.to(g.dtype).mT, g)[:, :size]
    return d_q, d_k.transpose(0, 1), d_v.transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some queries of a part, the keys that they may see, and their scores. A CPU's rows are filled
    up with zeros.
    """

    rows: slice  # queries of the part
    seen: slice  # keys of the part
    queries: Tensor  # [H_kv, G x rows, D], scaled, where G heads share keys
    keys: Tensor  # [H_kv, keys, D]
    values: Tensor  # [H_kv, keys, D_v]
    z: Tensor  # [H_kv, G x rows, keys]; -inf where a key is not seen
    slope: Tensor | None  # of soft-capping

    def by_key_head(self, x: Tensor) -> Tensor:
        """The rows of [q, H, D] as [H_kv, G x rows, D]."""
        return _laid_out(x[self.rows], len(self.keys))

    def by_query(self, x: Tensor) -> Tensor:
        """[H_kv, G x rows, D] as [rows, H, D], without what was filled up."""
        rows = self.rows.stop - self.rows.start
        filled = rows + _missing(rows, x)
        return x.unflatten(1, (-1, filled))[:, :, :rows].flatten(0, 1).transpose(0, 1)


def _blocks(q: Tensor, k: Tensor, v: Tensor, part: Part, rule: _Rule) -> Iterator[_Block]:
    """The blocks of a part, those that see the same keys one after another."""
    step = ROWS * (1 if q.device.type == "cpu" else 8)
    here = _at(rule.positions, part.queries)
    there = _at(rule.positions, part.keys)
    spans = zip(itertools.pairwise(part.bounds_q), itertools.pairwise(part.bounds_k), strict=True)
    for (first, last), (begin, end) in spans:
        keys, values = (_filled(x[begin:end]).transpose(0, 1).contiguous() for x in (k, v))
        for a in range(first, last, step):
            rows = slice(a, min(a + step, last))
            near = begin + _first_seen(here[rows], there[begin:end], rule.window)
            seen = slice(near, begin + rows.stop - first if part.causal else end)
            if seen.start >= seen.stop:
                continue
            size = seen.stop - seen.start
            among = slice(near - begin, near - begin + size + _missing(size, keys))
            queries = _laid_out(q[rows], len(keys)) * rule.scale
            z, slope = scores(queries, keys[:, among], rule.softcap)
            sure = (a - first if part.causal else end - begin) - among.start
            _hide(z, here[rows], there[seen], 0 if rule.window else sure, rule.window)
            yield _Block(rows, seen, queries, keys[:, among], values[:, among], z, slope)


def _first_seen(here: Tensor, there: Tensor, window: int) -> int:
    """The first key, by its number, that some query sees, rounded down; a GPU is not asked."""
    if not window or here.device.type != "cpu":
        return 0
    first = int(here.min() - there[0]) - window + 1
    return max(0, first) // FILL * FILL


def _hide(z: Tensor, here: Tensor, there: Tensor, sure: int, window: int) -> None:
    """Write -inf where a query at position `here` does not see a key at `there`, or what was filled
    up behind the keys; in place. The first `sure` keys are seen by all.
    """
    if sure >= z.shape[2]:
        return
    rows, keys = len(here), len(there)
    by_row = z.unflatten(1, (-1, rows + _missing(rows, z)))
    by_row[..., keys:] = UNSEEN
    distance = here[:, None] - there[sure:]
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    by_row[:, :, :rows, sure:keys].masked_fill_(hidden, UNSEEN)


def _missing(rows: int, like: Tensor) -> int:
    """How many rows a CPU's products get in addition."""
    return -rows % FILL if like.device.type == "cpu" else 0


def _filled(x: Tensor) -> Tensor:
    """`x` with as many rows as a CPU's products have, in at least fp32 there."""
    if x.device.type != "cpu":
        return x
    return F.pad(at_least_fp32(x), (0, 0, 0, 0, 0, _missing(len(x), x)))


def _laid_out(x: Tensor, key_heads: int) -> Tensor:
    """[rows, H, D] -> [H_kv, G x rows, D], where G heads share keys; a CPU's rows are filled up."""
    return _filled(x).unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
