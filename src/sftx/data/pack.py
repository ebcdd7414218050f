"""Placing examples into packs: flat streams of whole examples, without padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapreplace

import numpy as np

from sftx.types import Example, Int32, Pack

Bins = list[tuple[int, ...]]


def best_fit(lengths: Sequence[int] | Int32, capacity: int) -> Bins:
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


def balanced(lengths: Sequence[int] | Int32, capacity: int, world_size: int = 1) -> list[Bins]:
    """The bins of every rank: equally many on each, and as equally full as whole examples allow.

    The number of bins is the smallest multiple of `world_size` that best-fit needs. Examples then go, longest first,
    to the emptiest bin; where that overflows a bin, the best-fit bins are used as they are. Ranks that run short get
    empty bins, so that every rank takes part in every collective.
    """
    fewest = best_fit(lengths, capacity)
    count = -(-len(fewest) // world_size) * world_size
    members: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, b) for b in range(count)]  # a heap of (tokens, bin)
    for i in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        full, b = emptiest[0]
        members[b].append(i)
        heapreplace(emptiest, (full + int(lengths[i]), b))
    load = [full for full, _ in sorted(emptiest, key=lambda entry: entry[1])]
    spread = [tuple(sorted(m)) for m in members]
    overflow = any(full > capacity and len(m) > 1 for full, m in zip(load, spread, strict=True))
    bins = fewest + [()] * (count - len(fewest)) if overflow else spread
    if overflow:
        load = [sum(int(lengths[i]) for i in m) for m in bins]
    ranks: list[Bins] = [[] for _ in range(world_size)]
    total = [0] * world_size
    for b in sorted(range(count), key=lambda b: -load[b]):
        open_ranks = [r for r in range(world_size) if len(ranks[r]) < count // world_size]
        rank = min(open_ranks, key=lambda r: (total[r], r))
        ranks[rank].append(bins[b])
        total[rank] += load[b]
    return ranks


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
