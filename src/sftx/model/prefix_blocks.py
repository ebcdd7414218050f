"""Attention over segments that share prefixes, as matrix products: the CPU's kernel, and, on every
device, that of windows, soft-capping and sinks.

A query sees the chain of its segment whole, and its own segment up to itself. So the keys of a block
of queries are those of the chain, then those of the segment. Short segments that continue the same
chain and stand beside each other make one block; each sees itself only.

The formula, the blocks and what is filled up are those of `cpu_attention`. One custom op; its
backward computes the probabilities again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sftx.model.cpu_attention import FILL, ROWS, at_least_fp32, of_scores, scores
from sftx.model.prefix_index import Run, families_of

UNSEEN = float("-inf")


@torch.library.custom_op("sftx::shared_blocks", mutates_args=())
def shared_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    index: list[Tensor],
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """`q` [1, H, T, D], `k` and `v` [1, H_kv, T, D or D_v], `sinks` [H] -> [1, T, H, D_v] in the
    dtype of `q`.

    `index` = int64[T] positions, then what `prefix_index` returns, its bounds twice: on the device
    and on the host, where the table is too. `window` and `softcap` are 0 where there is none.
    """
    _, heads, tokens, _ = q.shape
    whole = at_least_fp32(q.new_empty(tokens, heads, v.shape[3]))
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(q, k, v, index, scale, window):
            p, _, _ = _probabilities(block, sinks, softcap)
            part = torch.bmm(p.to(block.values.dtype), block.values)
            whole[block.rows] = block.by_query(part)
    return whole[None].to(q.dtype)


@torch.library.custom_op("sftx::shared_blocks_backward", mutates_args=())
def _shared_blocks_backward(
    grad: Tensor,
    qkv: list[Tensor],
    sinks: Tensor | None,
    index: list[Tensor],
    scale: float,
    window: int,
    softcap: float,
) -> list[Tensor]:
    """Gradients of q, k, v and, where there are any, of the sinks."""
    q, k, v = qkv
    _, heads, tokens, width = q.shape
    d_q = at_least_fp32(q.new_empty(tokens, heads, width))
    d_k = k.new_zeros(k.shape[1:], dtype=d_q.dtype)
    d_v = v.new_zeros(v.shape[1:], dtype=d_q.dtype)
    d_sinks = at_least_fp32(grad.new_zeros(heads))
    with torch.autocast(grad.device.type, enabled=False):
        for block in _blocks(q, k, v, index, scale, window):
            p, slope, sink = _probabilities(block, sinks, softcap)
            g = block.by_key_head(grad[0]).to(block.values.dtype)
            d_p = at_least_fp32(torch.bmm(g, block.values.mT))
            d_z = of_scores(d_p, p, slope, sink, d_sinks).to(block.keys.dtype)
            d_block = torch.bmm(d_z, block.keys).mul_(scale)
            d_q[block.rows] = block.by_query(d_block)
            d_keys = torch.bmm(d_z.mT, block.queries)
            block.add_to(d_k, d_keys)
            d_values = torch.bmm(p.to(g.dtype).mT, g)
            block.add_to(d_v, d_values)
    totals = [d_q.transpose(0, 1), d_k, d_v]
    found = [total[None].to(q.dtype).contiguous() for total in totals]
    if sinks is not None:
        found.append(d_sinks.to(sinks.dtype))
    return found


@shared_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


@_shared_blocks_backward.register_fake
def _(
    grad: Tensor,
    qkv: list[Tensor],
    sinks: Tensor | None,
    *_: object,
) -> list[Tensor]:
    found = [x.new_empty(x.shape) for x in qkv]
    if sinks is not None:
        found.append(sinks.new_empty(sinks.shape))
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, sinks, index, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, sinks, *index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    q, k, v, sinks, *index = ctx.saved_tensors
    found = _shared_blocks_backward(grad, [q, k, v], sinks, index, *ctx.numbers)
    d_q, d_k, d_v, *rest = found
    d_sinks = None
    if sinks is not None:
        d_sinks = rest[0]
    of_index = [None for _ in index]
    return d_q, d_k, d_v, d_sinks, of_index, None, None, None


shared_blocks.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some queries of a run, and the keys that they may see: those of the chain, and those of the run
    up to the last query. It holds until the next block is asked for: the keys stand in a buffer.

    Keys have numbers: 0 is the first of the chain, and the run follows behind its last.
    """

    rows: slice  # of the pack: the queries
    places: list[slice]  # of the pack: where the keys stand, those of the chain first
    first: int  # number of the first key; those before it are out of the window
    queries: Tensor  # [H_kv, G x rows, D], scaled, where G heads share keys
    keys: Tensor  # [H_kv, keys, D]
    values: Tensor  # [H_kv, keys, D_v]
    sure: int  # that many keys are seen by all
    hidden: Tensor  # bool[rows, keys - sure]: which of the others a query does not see

    def by_key_head(self, x: Tensor) -> Tensor:
        """The rows of [T, H, D] as [H_kv, G x rows, D]."""
        return _laid_out(x[self.rows], len(self.keys))

    def by_query(self, x: Tensor) -> Tensor:
        """[H_kv, G x rows, D] as [rows, H, D], without what was filled up."""
        by_row = self.by_row(x)
        return by_row.flatten(0, 1).transpose(0, 1)

    def by_row(self, x: Tensor) -> Tensor:
        """[H_kv, G x rows, N] as [H_kv, G, rows, N], without the rows that were filled up."""
        rows = self.rows.stop - self.rows.start
        by_row = x.unflatten(1, (-1, _filled_up(rows, x)))
        return by_row[:, :, :rows]

    def add_to(self, total: Tensor, part: Tensor) -> None:
        """Add the gradients of the keys, [H_kv, keys, D], to those of the pack, [H_kv, T, D]; in
        place.
        """
        begin = -self.first  # where the next piece begins in `part`
        for place in self.places:
            end = begin + place.stop - place.start
            if end > 0:
                seen = part[:, max(begin, 0) : end]
                total[:, place.stop - seen.shape[1] : place.stop] += seen
            begin = end


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: list[Tensor],
    scale: float,
    window: int,
) -> Iterator[_Block]:
    """The blocks of a pack, family by family."""
    most = ROWS
    if q.device.type != "cpu":
        most *= 8
    by_token = q[0].transpose(0, 1)
    for family in families_of(index, most):
        before = family.before
        longest = max((run.tokens for run in family.runs), default=0)
        keys = _buffer(k[0], family.chain, longest)
        values = _buffer(v[0], family.chain, longest)
        for run in family.runs:
            own = slice(before, before + run.tokens)
            keys[:, own] = k[0, :, run.start : run.stop]
            values[:, own] = v[0, :, run.start : run.stop]
            for start in range(run.start, run.stop, most):
                rows = slice(start, min(start + most, run.stop))
                first, unsure, last = _seen(run, rows, before, window)
                end = first + _filled_up(last - first, keys)
                hidden = _hidden(run, rows, before, range(unsure, end), window)
                yield _Block(
                    rows=rows,
                    places=[*family.chain, slice(run.start, rows.stop)],
                    first=first,
                    queries=_laid_out(by_token[rows], len(keys)) * scale,
                    keys=keys[:, first:end],
                    values=values[:, first:end],
                    sure=unsure - first,
                    hidden=hidden.to(q.device),
                )


def _seen(run: Run, rows: slice, before: int, window: int) -> tuple[int, int, int]:
    """Numbers of keys: the first that some of the queries see, the first that some may not see, and
    one past the last.
    """
    first_query = before + rows.start - run.start
    last_query = before + rows.stop - run.start
    if not window:  # several segments make one block: what is before it, all see
        return 0, first_query, last_query
    first = max(0, first_query - window + 1)
    return first, first, last_query


def _hidden(
    run: Run,
    rows: slice,
    before: int,
    keys: range,
    window: int,
) -> Tensor:
    """bool[rows, keys]: whether a query of the run does not see a key. What is filled up has numbers
    behind every query.
    """
    offset = before - run.start
    key = torch.arange(keys.start, keys.stop)
    row = torch.arange(rows.start, rows.stop)
    query = row[:, None] + offset
    start = _starts(run)[:, None] + offset
    in_chain = key < before
    is_later = key > query
    of_another = (key < start) & ~in_chain
    hidden = is_later | of_another
    if window:
        position = query - start + before
        distance = torch.where(in_chain, position, query) - key
        hidden |= distance >= window
    return hidden


def _starts(run: Run) -> Tensor:
    """int64[tokens], or [1] where it is the same for all: where in the pack the segment of each token
    begins.
    """
    starts = torch.tensor([segment.start for segment in run.segments])
    if len(run.segments) == 1:
        return starts
    lengths = [segment.stop - segment.start for segment in run.segments]
    return starts.repeat_interleave(torch.tensor(lengths))


def _probabilities(
    block: _Block, sinks: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """p [H_kv, G x rows, keys] in at least fp32; the slope of soft-capping; the sinks' share."""
    z, slope = scores(block.queries, block.keys, softcap)
    unsure = block.by_row(z)[..., block.sure :]
    unsure.masked_fill_(block.hidden, UNSEEN)
    if sinks is None:
        return torch.softmax(z, -1), slope, None
    by_key_head = sinks.to(z.dtype).view(len(z), -1, 1)
    rows = z.shape[1] // by_key_head.shape[1]
    by_row = by_key_head.expand(-1, -1, rows)
    column = by_row.reshape(len(z), -1, 1)
    p = torch.softmax(torch.cat([z, column], -1), -1)
    return p[..., :-1].contiguous(), slope, p[..., -1:]


def _buffer(x: Tensor, chain: list[slice], longest: int) -> Tensor:
    """[H_kv, T, D] -> the pieces of the chain one after another, and room for a run, in at least fp32
    on a CPU. Zeros, as what is filled up must be finite.
    """
    pieces = [x[:, piece] for piece in chain]
    room = x.new_zeros(len(x), longest + FILL, x.shape[2])
    buffer = torch.cat([*pieces, room], dim=1)
    if x.device.type == "cpu":
        return at_least_fp32(buffer)
    return buffer


def _filled_up(count: int, like: Tensor) -> int:
    """How many rows a CPU's products get in place of so many."""
    if like.device.type != "cpu":
        return count
    return count + -count % FILL


def _laid_out(x: Tensor, key_heads: int) -> Tensor:
    """[rows, H, D] -> [H_kv, G x rows, D], where G heads share keys; a CPU's rows are filled up."""
    missing = _filled_up(len(x), x) - len(x)
    if x.device.type == "cpu":
        behind = (0, 0, 0, 0, 0, missing)
        x = F.pad(at_least_fp32(x), behind)
    by_token = x.unflatten(1, (key_heads, -1))
    by_key_head = by_token.permute(1, 2, 0, 3)
    return by_key_head.flatten(1, 2)
