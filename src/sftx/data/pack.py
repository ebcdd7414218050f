"""Placing examples into packs: flat streams of whole examples, without padding.

Where a model can only run them as the rows of a right-padded batch, a pack holds examples of like
lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sftx.types import Example, Pack

Bins = list[tuple[int, ...]]
Float64 = NDArray[np.float64]
Lengths = Sequence[int] | NDArray[np.integer]
PADDING = 0.1
"""Share of a right-padded batch that is padding, at most."""


def balanced(
    lengths: Lengths, capacity: int, world_size: int = 1, work: Float64 | None = None
) -> list[Bins]:
    """The bins of every rank: equally many on each, and with as equal sums of `work` as whole
    examples allow.

    Examples go, the most work first, to the bin with the least of it that has room, in the fewest
    bins for which that succeeds (or 2 % more). Ranks that run short get empty bins, so that every
    rank takes part in every collective. `work` = the lengths, where none is given.
    """
    sizes = np.asarray(lengths, np.int64)
    costs = np.asarray(sizes if work is None else work, np.float64)
    by_tokens = -(-int(sizes.sum()) // (capacity * world_size))
    by_examples = -(
        -len(sizes) // world_size
    )  # more bins would be empty, where examples are longer than `capacity`
    each = max(min(by_tokens, by_examples), 1)  # bins of a rank
    while (bins := _spread(sizes, costs, capacity, each * world_size)) is None:
        each += 1 + each // 50
    load = np.array([costs[list(members)].sum() for members in bins])
    return _dealt(bins, load, world_size)


def like_lengths(lengths: Lengths, capacity: int, world_size: int = 1) -> list[Bins]:
    """The bins of every rank, equally many on each, for a model that runs a bin as a right-padded
    batch: at most `capacity` tokens with the padding, of which `PADDING` at most is that; or one
    example.

    The examples follow one another from the longest to the shortest. Where the bins cannot be dealt
    evenly, the largest are halved; then some ranks get empty ones.
    """
    sizes = np.asarray(lengths, np.int64)
    bins: list[list[int]] = []
    longest = tokens = 0
    for i in np.argsort(-sizes, kind="stable").tolist():
        padded = longest * (len(bins[-1]) + 1) if bins else capacity + 1
        if padded > capacity or tokens + sizes[i] < (1 - PADDING) * padded:
            bins.append([])
            longest, tokens = int(sizes[i]), 0
        bins[-1].append(i)
        tokens += int(sizes[i])
    while len(bins) % world_size and max(map(len, bins)) > 1:
        several = [members for members in bins if len(members) > 1]
        largest = max(several, key=lambda members: len(members) * int(sizes[members[0]]))
        half = len(largest) // 2
        bins.remove(largest)
        bins += [largest[:half], largest[half:]]
    made: Bins = [tuple(sorted(members)) for members in bins]
    made += [()] * (-len(made) % world_size)
    load = np.array([batch_tokens(sizes, members) for members in made], np.float64)
    return _dealt(made, load, world_size)


def batch_tokens(lengths: NDArray[np.integer], members: tuple[int, ...]) -> int:
    """Tokens of a bin as a right-padded batch, padding included."""
    return len(members) * int(lengths[list(members)].max(initial=0))


def _dealt(bins: Bins, load: Float64, world_size: int) -> list[Bins]:
    """The bins of every rank, equally many on each: the largest first, to the rank that has least."""
    each = len(bins) // world_size
    ranks: list[Bins] = [[] for _ in range(world_size)]
    total = [0.0] * world_size
    for b in np.argsort(-load, kind="stable"):
        open_ranks = [r for r in range(world_size) if len(ranks[r]) < each]
        rank = min(open_ranks, key=lambda r: (total[r], r))
        ranks[rank].append(bins[int(b)])
        total[rank] += float(load[b])
    return ranks


def _spread(sizes: NDArray[np.int64], costs: Float64, capacity: int, count: int) -> Bins | None:
    """`count` bins about equal in cost, each of at most `capacity` tokens or one example; None if
    too few are found.
    """
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
    """Lay `examples` end to end. No examples give a pack of one token and no target, whose loss is
    exactly 0.
    """
    if not examples:
        nothing = np.zeros(0, np.int32)
        one = np.zeros(1, np.int32)
        return Pack(one, one, np.array([0, 1], np.int32), nothing, nothing, np.zeros(0, np.float32))
    lengths = [len(example.ids) for example in examples]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([example.ids for example in examples]).astype(np.int32)
    weights = np.concatenate([example.weights for example in examples]).astype(np.float32)
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
    """Three short segments to measure with: the beginnings of examples, every token of them a
    target.
    """
    beginnings = [examples[i % len(examples)].ids[: tokens - 5 * i] for i in range(3)]
    return build_pack([Example(ids, np.ones(len(ids), np.float32)) for ids in beginnings])


def blank_pack(tokens: int, longest: int, target_share: float) -> Pack:
    """A pack of `tokens` meaningless tokens in examples of at most `longest`, the last share of
    each being targets.
    """
    lengths = [min(longest, tokens - start) for start in range(0, tokens, longest)]
    weights = [(np.arange(n, 0, -1) <= round(target_share * n)).astype(np.float32) for n in lengths]
    return build_pack([Example(np.zeros(len(w), np.int32), w) for w in weights])
