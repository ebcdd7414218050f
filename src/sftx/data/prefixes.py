"""Prefixes that examples share: which of them are worth sharing, and the tree that they make.

Sorted by their tokens, examples that begin alike stand beside each other, and one number says all:
how many tokens an example shares with the one before it. What two examples share that are further
apart is the least of the numbers between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sftx.data.pack import build_pack
from sftx.types import Example, Float32, Int32, Int64, Pack

LEAST = 16
"""Tokens that a shared piece must have: a shorter one costs about what it saves, as it is one more
segment to attend to.
"""
GAIN = 0.03
"""Share of a step's tokens that sharing must save; below it the step is packed as it is."""


class SharedOrder(NamedTuple):
    """Examples in an order in which those that share a prefix stand beside each other."""

    order: Int64  # [n] their numbers
    shared: Int64  # [n] how many tokens each shares with the one before it; 0 = nothing


def shared_order(tokens: Sequence[Int32]) -> SharedOrder | None:
    """The order of examples with these tokens, int32[T] each; None where nothing is worth sharing."""
    alike = _with_equal_beginnings(tokens)
    if not alike:
        return None
    alike.sort(key=lambda i: tokens[i].astype(">u4").tobytes())  # bytes that compare as tokens do
    common = np.zeros(len(alike), np.int64)
    for place, (before, example) in enumerate(pairwise(alike), 1):
        common[place] = _common(tokens[before], tokens[example])
    lengths = np.array([len(tokens[i]) for i in alike])
    worth = _worth_sharing(common, lengths)
    all_tokens = sum(len(ids) for ids in tokens)
    if worth.sum() < GAIN * all_tokens:
        return None
    others = np.delete(np.arange(len(tokens)), alike)
    order = np.concatenate([alike, others])
    shared = np.zeros(len(tokens), np.int64)
    shared[: len(alike)] = worth
    return SharedOrder(order, shared)


def _with_equal_beginnings(tokens: Sequence[Int32]) -> list[int]:
    """Numbers of the examples whose first `LEAST` tokens are those of another one too."""
    beginnings = [ids[:LEAST].tobytes() for ids in tokens]
    times = Counter(beginnings)
    alike: list[int] = []
    for number, beginning in enumerate(beginnings):
        if times[beginning] > 1 and len(tokens[number]) >= LEAST:
            alike.append(number)
    return alike


def _common(a: Int32, b: Int32) -> int:
    """How many tokens two examples share from their beginnings on."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    ended = np.append(differs, True)
    return int(ended.argmax())


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
        if last - first < 2:
            continue
        between = common[first + 1 : last]
        fork = int(between.min())
        longest = int(lengths[first:last].max())
        all_end_here = longest == fork
        if fork - depth >= LEAST or all_end_here:
            depth = fork
        cuts = first + 1 + np.flatnonzero(between == fork)
        worth[cuts] = depth
        for branch_first, branch_last in pairwise([first, *cuts.tolist(), last]):
            waiting.append((branch_first, branch_last, depth))
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

    @property
    def tokens(self) -> slice:
        """Where the tokens stand in each of its examples."""
        return slice(self.start, self.stop)


def segments_of(
    lengths: Sequence[int],
    shared: Sequence[int],
) -> list[Segment]:
    """The segments of a pack, parents before their children, of examples in shared order.

    An example that ends where others fork has no segment of its own; neither have equal ones.
    """
    found: list[Segment] = []
    waiting = [(-1, 0, len(lengths), 0)]
    while waiting:
        parent, first, last, start = waiting.pop()
        # Alone an example goes on to its end, together they go on to where they fork.
        stop = min(shared[first + 1 : last], default=lengths[first])
        if stop > start:
            found.append(Segment(parent, first, last, start, stop))
            parent = len(found) - 1
        forks = [k for k in range(first + 1, last) if shared[k] == stop]
        branches: list[tuple[int, int, int, int]] = []
        for a, b in pairwise([first, *forks, last]):
            if b - a > 1 or lengths[a] > stop:
                branches.append((parent, a, b, stop))
        waiting += reversed(branches)
    return found


def build_shared_pack(
    examples: Sequence[Example],
    indices: tuple[int, ...] = (),
    shared: Sequence[int] = (),
) -> Pack:
    """Lay `examples`, which are in shared order, into a pack that holds what they share once.

    A target in a shared piece has the sum of its weights in the examples that hold it.
    """
    if not any(shared):
        return build_pack(examples, indices)
    whole = [len(example.ids) for example in examples]
    segments = segments_of(whole, shared)
    ids = np.concatenate([examples[s.first].ids[s.tokens] for s in segments])
    weights = np.concatenate([summed_weights(examples, s) for s in segments])
    positions = np.concatenate([np.arange(s.start, s.stop) for s in segments])
    times = np.array([s.last - s.first for s in segments])
    lengths = [s.stop - s.start for s in segments]
    cu_seqlens = np.append(0, np.cumsum(lengths))
    parent = np.array([s.parent for s in segments])
    # A token is predicted by the one before it, the first of a branch by the last of its parent.
    before = np.arange(-1, len(ids) - 1)
    branches = np.flatnonzero(parent >= 0)
    ends = cu_seqlens[1:]
    before[cu_seqlens[branches]] = ends[parent[branches]] - 1
    label_at = np.flatnonzero(weights)
    return Pack(
        ids=ids.astype(np.int32),
        positions=positions.astype(np.int32),
        cu_seqlens=cu_seqlens.astype(np.int32),
        index=before[label_at].astype(np.int32),
        label=ids[label_at].astype(np.int32),
        weight=weights[label_at],
        examples=indices,
        parent=parent.astype(np.int32) if len(branches) else None,
        times=times.astype(np.int32),
    )


def summed_weights(examples: Sequence[Example], segment: Segment) -> Float32:
    """float32: the weights of a segment's tokens, added up in float64 over its examples."""
    total = np.zeros(segment.stop - segment.start)
    for example in examples[segment.first : segment.last]:
        total += example.weights[segment.tokens]
    return total.astype(np.float32)
