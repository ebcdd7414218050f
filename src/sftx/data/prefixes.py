"""Prefixes that examples share: which of them are worth sharing, and the tree that they make.

Sorted by their tokens, examples that begin alike stand beside each other, and one number says all:
how many tokens an example shares with the one before it. What two examples share that are further
apart is the least of the numbers between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftx.data.pack import build_pack
from sftx.types import Example, Float32, Int32, Pack

Int64 = NDArray[np.int64]
LEAST = 16
"""Tokens that a shared piece must have: a shorter one costs about what it saves, as it is one more
segment to attend to.
"""
GAIN = 0.03
"""Share of a step's tokens that sharing must save; below it the step is packed as it is."""
_FACTORS = np.random.RandomState(0).randint(1, 2**62, LEAST).astype(np.uint64) | np.uint64(1)


class SharedOrder(NamedTuple):
    """Examples in an order in which those that share a prefix stand beside each other."""

    order: Int64  # [n] their numbers
    shared: Int64  # [n] how many tokens each shares with the one before it; 0 = nothing


def shared_order(tokens: Sequence[Int32]) -> SharedOrder:
    """The order of examples with these tokens, int32[T] each; the given one where nothing is worth
    sharing.
    """
    count = len(tokens)
    alike = _with_equal_beginnings(tokens)
    candidates: list[int] = alike.tolist()
    keys = {i: tokens[i].astype(">u4").tobytes() for i in candidates}  # they compare as tokens do
    candidates.sort(key=keys.__getitem__)
    alike = np.array(candidates, np.int64)
    common = np.zeros(len(alike), np.int64)
    for k, (a, b) in enumerate(pairwise(candidates), 1):
        common[k] = _common(tokens[a], tokens[b])
    lengths = np.array([len(tokens[i]) for i in candidates], np.int64)
    worth = _worth_sharing(common, lengths)
    if worth.sum() < GAIN * sum(map(len, tokens)):
        return SharedOrder(np.arange(count), np.zeros(count, np.int64))
    others = np.delete(np.arange(count), alike)
    shared = np.concatenate([worth, np.zeros(len(others), np.int64)])
    return SharedOrder(np.concatenate([alike, others]), shared)


def _with_equal_beginnings(tokens: Sequence[Int32]) -> Int64:
    """Numbers of the examples whose first `LEAST` tokens are those of another one too, by a hash of
    them.
    """
    numbers = [i for i, ids in enumerate(tokens) if len(ids) >= LEAST]
    long = np.array(numbers, np.int64)
    if len(long) < 2:
        return long[:0]
    beginnings = np.stack([tokens[i][:LEAST] for i in numbers]).astype(np.uint64)
    hashes = (beginnings * _FACTORS).sum(axis=1, dtype=np.uint64)
    _, which, times = np.unique(hashes, return_inverse=True, return_counts=True)
    return long[times[which] > 1]


def _common(a: Int32, b: Int32) -> int:
    """How many tokens two examples share from their beginnings on."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length


def _worth_sharing(common: Int64, lengths: Int64) -> Int64:
    """int64[n]: of the tokens that each example has in common with the one before it, how many are
    computed once.

    From the root down: a piece between two forks is shared where it has `LEAST` tokens, else each
    branch computes it. Equal examples are always one.
    """
    worth = np.zeros_like(common)
    waiting = [(0, len(common), 0)]
    while waiting:
        first, last, depth = waiting.pop()
        between = common[first + 1 : last]
        if not len(between):
            continue
        fork = int(between.min())
        all_end_here = int(lengths[first:last].max()) == fork
        if fork - depth >= LEAST or all_end_here:
            depth = fork
        cuts = first + 1 + np.flatnonzero(between == fork)
        worth[cuts] = depth
        waiting += [(a, b, depth) for a, b in pairwise([first, *cuts.tolist(), last])]
    return worth


class Segment(NamedTuple):
    """Tokens that are computed once: those from `start` up to `stop` of the examples from `first`
    up to `last`, which continue segment `parent` (-1: they begin anew).
    """

    parent: int
    first: int
    last: int
    start: int
    stop: int


def segments_of(lengths: Sequence[int], shared: Sequence[int]) -> list[Segment]:
    """The segments of a pack, parents before their children, of examples in shared order.

    An example that ends where others fork has no segment of its own; neither have equal ones.
    """
    found: list[Segment] = []
    waiting = [(-1, 0, len(lengths), 0)]
    while waiting:
        parent, first, last, start = waiting.pop()
        stop = min(shared[first + 1 : last], default=lengths[first])
        if stop > start:
            found.append(Segment(parent, first, last, start, stop))
            parent = len(found) - 1
        cuts = [k for k in range(first + 1, last) if shared[k] == stop]
        branches = [
            (parent, a, b, stop)
            for a, b in pairwise([first, *cuts, last])
            if b - a > 1 or lengths[a] > stop
        ]
        waiting += reversed(branches)
    return found


def build_shared_pack(
    examples: Sequence[Example], indices: tuple[int, ...] = (), shared: Sequence[int] = ()
) -> Pack:
    """Lay `examples`, which are in shared order, into a pack that holds what they share once.

    A target in a shared piece has the sum of its weights in the examples that hold it.
    """
    if not any(shared):
        return build_pack(examples, indices)
    segments = segments_of([len(example.ids) for example in examples], shared)
    ids = np.concatenate([examples[s.first].ids[s.start : s.stop] for s in segments])
    weights = np.concatenate([summed_weights(examples, s) for s in segments])
    positions = np.concatenate([np.arange(s.start, s.stop) for s in segments])
    cu_seqlens = np.cumsum([0, *(s.stop - s.start for s in segments)])
    parent = np.array([s.parent for s in segments])
    child = np.flatnonzero(parent >= 0)
    before = np.arange(-1, len(ids) - 1)  # where the token before each stands
    before[cu_seqlens[child]] = cu_seqlens[parent[child] + 1] - 1
    label_at = np.flatnonzero(weights)
    return Pack(
        ids=ids.astype(np.int32),
        positions=positions.astype(np.int32),
        cu_seqlens=cu_seqlens.astype(np.int32),
        index=before[label_at].astype(np.int32),
        label=ids[label_at].astype(np.int32),
        weight=weights[label_at],
        examples=indices,
        parent=parent.astype(np.int32) if len(child) else None,
        times=np.array([s.last - s.first for s in segments], np.int32),
    )


def summed_weights(examples: Sequence[Example], segment: Segment) -> Float32:
    """float32: the weights of a segment's tokens, added up in float64 over its examples."""
    total = np.zeros(segment.stop - segment.start)
    for example in examples[segment.first : segment.last]:
        total += example.weights[segment.start : segment.stop]
    return total.astype(np.float32)
