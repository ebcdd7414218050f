"""Placing examples into packs: flat streams of whole examples, without padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sftx.types import Example, Pack

Bins = list[tuple[int, ...]]
Float64 = NDArray[np.float64]
Lengths = Sequence[int] | NDArray[np.integer]


def best_fit(lengths: Lengths, capacity: int) -> Bins:
    """Best-fit decreasing: the fewest bins of `capacity` tokens that a greedy placement finds.

    Returns positions into `lengths`, one tuple per bin. A length above `capacity` gets a bin of its own.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for i in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[i])
        fits = bisect_left(rooms, (length, -1))
        if fits < len(rooms):
            room, best = rooms.pop(fits)
            bins[best].append(i)
        else:
            room, best = capacity, len(bins)
            bins.append([i])
        insort(rooms, (room - length, best))
    return [tuple(sorted(members)) for members in bins]


def balanced(lengths: Lengths, capacity: int, world_size: int = 1, work: Float64 | None = None) -> list[Bins]:
    """The bins of every rank: equally many on each, and with as equal sums of `work` as whole examples allow.

    The number of bins is the smallest multiple of `world_size` in which examples find room when they go, the most work
    first, to the bin with the least of it. Ranks that run short get empty bins, so that every rank takes part in every
    collective. `work` = the lengths, where none is given.
    """
    sizes = np.asarray(lengths, np.int64)
    costs = np.asarray(sizes if work is None else work, np.float64)
    count = -(-len(best_fit(sizes, capacity)) // world_size) * world_size
    while (bins := _spread(sizes, costs, capacity, count)) is None:
        count += world_size
    load = np.array([costs[list(members)].sum() for members in bins])
    ranks: list[Bins] = [[] for _ in range(world_size)]
    total = [0.0] * world_size
    for b in np.argsort(-load, kind="stable"):
        open_ranks = [r for r in range(world_size) if len(ranks[r]) < count // world_size]
        rank = min(open_ranks, key=lambda r: (total[r], r))
        ranks[rank].append(bins[b])
        total[rank] += float(load[b])
    return ranks


def _spread(sizes: NDArray[np.int64], costs: Float64, capacity: int, count: int) -> Bins | None:
    """`count` bins about equal in cost, each of at most `capacity` tokens or one example; None if too few are found."""
    members: Bins = [()] * count
    full, load = np.zeros(count, np.int64), np.zeros(count)
    for i in np.argsort(-costs, kind="stable").tolist():
        room = (full + sizes[i] <= capacity) | (full == 0)
        if not room.any():
            return None
        b = int(np.where(room, load, np.inf).argmin())
        members[b] += (i,)
        full[b] += sizes[i]
        load[b] += costs[i]
    return [tuple(sorted(some)) for some in members]


def build_pack(examples: Sequence[Example], indices: tuple[int, ...] = ()) -> Pack:
    """Lay `examples` end to end. No examples give a pack of one token and no target, whose loss is exactly 0."""
    if not examples:
        nothing = np.zeros(0, np.int32)
        one = np.zeros(1, np.int32)
        return Pack(one, one, np.array([0, 1], np.int32), nothing, nothing, np.zeros(0, np.float32))
    lengths = [len(example.ids) for example in examples]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([example.ids for example in examples]).astype(np.int32)
    weights = np.concatenate([example.weights for example in examples]).astype(np.float32)
    weights[cu_seqlens[:-1]] = 0.0  # nothing stands before a segment's first token
    label_at = np.flatnonzero(weights)
    return Pack(
        ids=ids,
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        cu_seqlens=cu_seqlens,
        index=(label_at - 1).astype(np.int32),
        label=ids[label_at],
        weight=weights[label_at],
        examples=indices,
    )


def probe_pack(examples: Sequence[Example], tokens: int = 32) -> Pack:
    """Three short segments to measure with: the beginnings of examples, every token of them a target."""
    beginnings = [examples[i % len(examples)].ids[: tokens - 5 * i] for i in range(3)]
    return build_pack([Example(ids, np.ones(len(ids), np.float32)) for ids in beginnings])


def blank_pack(tokens: int, longest: int, target_share: float) -> Pack:
    """A pack of `tokens` meaningless tokens in examples of at most `longest`, the last share of each being targets."""
    lengths = [min(longest, tokens - start) for start in range(0, tokens, longest)]
    weights = [(np.arange(n, 0, -1) <= round(target_share * n)).astype(np.float32) for n in lengths]
    return build_pack([Example(np.zeros(len(w), np.int32), w) for w in weights])
