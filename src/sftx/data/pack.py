"""Placing examples into packs: flat streams of whole examples, without padding.

Where a model can only run them as the rows of a right-padded batch, a pack holds examples of like
lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sftx.types import Example, Float64, Int64, Pack

Bins = list[tuple[int, ...]]
"""Some packs, each as the indices of its examples."""
Lengths = Sequence[int] | NDArray[np.integer]
PADDING = 0.1
"""Share of a right-padded batch that is padding, at most."""


def balanced(
    lengths: Lengths, capacity: int, world_size: int = 1, work: Float64 | None = None
) -> list[Bins]:
    """The bins of every rank: equally many on each, and with as equal sums of `work` as whole
    examples allow; on one rank with equal tokens, as it waits for no other.

    Examples go, the most work first, to the bin with the least of it that has room, in the fewest
    bins for which that succeeds (or 2 % more). Ranks that run short get empty bins, so that every
    rank takes part in every collective. `work` = the lengths, where none is given.
    """
    sizes = np.asarray(lengths, np.int64)
    costs = sizes.astype(np.float64)
    if work is not None and world_size > 1:
        costs = work
    by_tokens = rounded_up(int(sizes.sum()), capacity * world_size)
    # More bins would be empty, where examples are longer than `capacity`.
    by_examples = rounded_up(len(sizes), world_size)
    bins_per_rank = max(min(by_tokens, by_examples), 1)
    bins = _spread(sizes, costs, capacity, bins_per_rank * world_size)
    while bins is None:
        bins_per_rank += 1 + bins_per_rank // 50
        bins = _spread(sizes, costs, capacity, bins_per_rank * world_size)
    load = np.array([costs[list(members)].sum() for members in bins])
    return _dealt(bins, load, world_size)


def rounded_up(number: int, divisor: int) -> int:
    """The quotient of two whole numbers, rounded up."""
    return -(-number // divisor)


def _spread(sizes: Int64, costs: Float64, capacity: int, count: int) -> Bins | None:
    """`count` bins about equal in cost, each of at most `capacity` tokens or one example; None if
    an example finds no room.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    full = np.zeros(count, np.int64)  # tokens in each bin
    load = np.zeros(count)  # cost of each bin
    most_cost_first = np.argsort(-costs, kind="stable")
    for i in most_cost_first.tolist():
        has_room = (full + sizes[i] <= capacity) | (full == 0)
        if not has_room.any():
            return None
        least_load = int(np.where(has_room, load, np.inf).argmin())
        bins[least_load].append(i)
        full[least_load] += sizes[i]
        load[least_load] += costs[i]
    return [tuple(sorted(members)) for members in bins]


def like_lengths(lengths: Lengths, capacity: int, world_size: int = 1) -> list[Bins]:
    """The bins of every rank, equally many on each, for a model that runs a bin as a right-padded
    batch: at most `capacity` tokens with the padding, of which `PADDING` at most is that; or one
    example.

    The examples follow one another from the longest to the shortest. Where the bins cannot be dealt
    evenly, the largest are halved; then some ranks get empty ones.
    """
    sizes = np.asarray(lengths, np.int64)
    bins: list[list[int]] = []
    longest = 0  # tokens of the longest example in the last bin, which is its first
    tokens = 0  # of all examples in the last bin
    longest_first = np.argsort(-sizes, kind="stable")
    for i in longest_first.tolist():
        size = int(sizes[i])
        fits = False
        if bins:
            padded = longest * (len(bins[-1]) + 1)
            fits = padded <= capacity and tokens + size >= (1 - PADDING) * padded
        if not fits:
            bins.append([])
            longest = size
            tokens = 0
        bins[-1].append(i)
        tokens += size
    _halve_largest(bins, sizes, world_size)
    made: Bins = [tuple(sorted(members)) for members in bins]
    while len(made) % world_size:
        made.append(())
    load = np.array([batch_tokens(sizes, members) for members in made], np.float64)
    return _dealt(made, load, world_size)


def _halve_largest(bins: list[list[int]], sizes: Int64, world_size: int) -> None:
    """Halve the largest bin, and again, until the bins can be dealt evenly or no bin has two
    examples.
    """
    while len(bins) % world_size:
        several = [members for members in bins if len(members) > 1]
        if not several:
            return
        largest = max(several, key=lambda members: batch_tokens(sizes, members))
        half = len(largest) // 2
        bins.remove(largest)
        bins.append(largest[:half])
        bins.append(largest[half:])


def batch_tokens(lengths: Int64, members: Sequence[int]) -> int:
    """Tokens of a bin as a right-padded batch, padding included."""
    longest = int(lengths[list(members)].max(initial=0))
    return len(members) * longest


def _dealt(bins: Bins, load: Float64, world_size: int) -> list[Bins]:
    """The bins of every rank, equally many on each: the largest first, to the rank that has least."""
    each = len(bins) // world_size
    ranks: list[Bins] = [[] for _ in range(world_size)]
    total = [0.0] * world_size
    largest_first: list[int] = np.argsort(-load, kind="stable").tolist()
    for b in largest_first:
        open_ranks = [r for r in range(world_size) if len(ranks[r]) < each]
        rank = min(open_ranks, key=total.__getitem__)  # of equal ones the first
        ranks[rank].append(bins[b])
        total[rank] += float(load[b])
    return ranks


def build_pack(examples: Sequence[Example], indices: tuple[int, ...] = ()) -> Pack:
    """Lay `examples` end to end. No examples give a pack of one token and no target, whose loss is
    exactly 0.
    """
    if not examples:
        examples = [Example(np.zeros(1, np.int32), np.zeros(1, np.float32))]
    lengths = [len(example.ids) for example in examples]
    ids = np.concatenate([example.ids for example in examples]).astype(np.int32)
    weights = np.concatenate([example.weights for example in examples]).astype(np.float32)
    label_at = np.flatnonzero(weights)
    return Pack(
        ids=ids,
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        index=(label_at - 1).astype(np.int32),
        label=ids[label_at],
        weight=weights[label_at],
        examples=indices,
    )


def probe_pack(examples: Sequence[Example], tokens: int = 32) -> Pack:
    """Three short segments to measure with: the beginnings of examples, every token of them a
    target.
    """
    beginnings: list[Example] = []
    for i in range(3):
        example = examples[i % len(examples)]
        ids = example.ids[: tokens - 5 * i]
        beginnings.append(Example(ids, np.ones(len(ids), np.float32)))
    return build_pack(beginnings)


def blank_pack(tokens: int, longest: int, target_share: float) -> Pack:
    """A pack of `tokens` meaningless tokens in examples of at most `longest`, the last share of
    each being targets.
    """
    examples: list[Example] = []
    for start in range(0, tokens, longest):
        length = min(longest, tokens - start)
        targets = round(target_share * length)
        weights = np.zeros(length, np.float32)
        weights[length - targets :] = 1
        examples.append(Example(np.zeros(length, np.int32), weights))
    return build_pack(examples)
