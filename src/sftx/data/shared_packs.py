"""Placing the examples of a step into packs, so that those which share a prefix share a pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sftx.data.pack import balanced
from sftx.data.plan import Plan
from sftx.data.prefixes import build_shared_pack, shared_order
from sftx.data.store.corpus import Corpus
from sftx.evenly import evenly
from sftx.types import Bools, Example, Float64, Int64, Pack

Unit = tuple[int, int]
"""(first, one past the last) of examples in shared order."""
FINER = (1, 2, 4, 8)
"""Into how many units the share of a rank is cut at least: finer ones can be dealt more equally,
and compute more prefixes again.
"""
EVEN = 1.02
"""The work of the busiest rank, by that of an average one, with which no finer cut is tried."""
SAMPLE = 20
"""Steps that are looked at to tell what sharing saves."""
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
"""Tokens per pack that are compared: a tree that is cut computes its prefix again in each part."""
LARGER = 8
"""Packs in which prefixes are shared may get this many times as large as others: a prefix is computed
again in each pack.
"""
MORE = 1.1
"""Work in packs of a size, by that in packs that cut no tree, up to which the size is large enough."""


class Members(NamedTuple):
    """The examples of a pack, and how many tokens each shares with the one before it (empty:
    nothing is shared).
    """

    examples: tuple[int, ...]
    shared: tuple[int, ...] = ()

    def build(self, read: Callable[[int], Example]) -> Pack:
        """The pack, whose examples `read` gives by their numbers."""
        examples = [read(number) for number in self.examples]
        return build_shared_pack(examples, self.examples, self.shared)


@dataclass(frozen=True, slots=True)
class Saving:
    """What sharing saves in some steps: of their tokens, of the squares of their examples' lengths,
    and of their work, in the unit of `Plan.work`.
    """

    tokens: float = 0.0
    saved_tokens: float = 0.0
    squares: float = 0.0
    saved_squares: float = 0.0
    work: float = 0.0
    saved_work: float = 0.0
    pack_size: int = 0  # of `SIZES`, the smallest that saves nearly all of it

    @property
    def share(self) -> float:
        """The share of the tokens that need not be computed."""
        return self.saved_tokens / max(self.tokens, 1.0)

    def notes(self) -> list[str]:
        """What a run says of it."""
        if not self.saved_tokens:
            return []
        return [f"shared prefixes are computed once: {self.share:.0%} of the tokens are saved"]


def packs_of_step(
    plan: Plan,
    corpus: Corpus,
    step: int,
    tokens_per_pack: int,
    share: bool,
    world_size: int = 1,
    padded: bool = False,
) -> tuple[list[list[Members]], Callable[[int], Example]]:
    """For every rank, the packs of `step` (0-based), in which prefixes are shared where `share`
    says so; and what reads their examples. With `padded` each is to run as a right-padded batch.
    """
    if not share:
        return _plain_packs(plan, step, tokens_per_pack, world_size, padded), corpus.example
    examples = _examples(plan, corpus, step)
    ranks = shared_packs(plan, step, tokens_per_pack, world_size, examples)
    return ranks, examples.__getitem__


def saving_of(plan: Plan, corpus: Corpus, tokens_per_pack: int = 1 << 60) -> Saving:
    """What sharing saves in a sample of the steps of a run, on one process."""
    longest = int(plan.lengths.max())
    tokens, squares, work = 0.0, 0.0, 0.0
    saved_tokens, saved_squares, saved_work = 0.0, 0.0, 0.0
    saved_by_size = np.zeros(len(SIZES))
    for step in evenly(plan.num_steps, SAMPLE):
        chosen = plan.examples(step)
        lengths = plan.lengths[chosen].astype(np.float64)
        tokens += lengths.sum()
        squares += (lengths**2).sum()
        work += plan.work[chosen].sum()
        found = _in_shared_order(plan, step, _examples(plan, corpus, step))
        if found is None:
            continue
        once = found.computed_once(max(tokens_per_pack, longest))
        shared = found.shared[once].astype(np.float64)
        saved_tokens += shared.sum()
        saved_squares += (shared**2).sum()
        saved_work += found.saved[once].sum()
        for place, size in enumerate(SIZES):
            limit = max(size, longest)
            once = found.computed_once(limit)
            saved_by_size[place] += found.saved[once].sum()
    return Saving(
        tokens=tokens,
        saved_tokens=saved_tokens,
        squares=squares,
        saved_squares=saved_squares,
        work=work,
        saved_work=saved_work,
        pack_size=_enough(work - saved_by_size),
    )


def _enough(work: Float64) -> int:
    """The smallest size of packs with which little more is computed than with any; `work`: with packs
    of each of `SIZES`.
    """
    is_enough = work <= MORE * work.min()
    return SIZES[int(is_enough.argmax())]


def _examples(plan: Plan, corpus: Corpus, step: int) -> dict[int, Example]:
    chosen: list[int] = plan.examples(step).tolist()
    return {number: corpus.example(number) for number in chosen}


def _plain_packs(
    plan: Plan,
    step: int,
    tokens_per_pack: int,
    world_size: int,
    padded: bool = False,
) -> list[list[Members]]:
    ranks: list[list[Members]] = []
    for bins in plan.packs(step, tokens_per_pack, world_size, padded):
        packs = [Members(numbers) for numbers in bins]
        ranks.append(packs)
    return ranks


@dataclass(frozen=True, slots=True, eq=False)
class SharedStep:
    """The examples of a step in shared order, and what each costs alone and saves behind the one
    before it.
    """

    examples: Int64  # [n] their numbers
    lengths: Int64
    shared: Int64
    work: Float64
    saved: Float64

    def tokens(self, first: int, last: int) -> int:
        """Tokens that examples `first` up to `last` take in one pack."""
        whole = self.lengths[first:last].sum()
        return int(whole - self.shared[first + 1 : last].sum())

    def costs(self, first: int, last: int) -> float:
        """Work that they take in one pack."""
        whole = self.work[first:last].sum()
        return float(whole - self.saved[first + 1 : last].sum())

    def trees(self) -> list[Unit]:
        """The examples of every tree."""
        roots: list[int] = np.flatnonzero(self.shared == 0).tolist()
        return list(pairwise([*roots, len(self.shared)]))

    def units(self, limit: int) -> list[Unit]:
        """Examples that stay together: whole trees of at most `limit` tokens, and parts of larger
        ones.
        """
        units: list[Unit] = []
        for first, last in self.trees():
            while self.tokens(first, last) > limit and last - first > 1:
                cut = self._cut(first, last, limit)
                units.append((first, cut))
                first = cut
            units.append((first, last))
        return units

    def computed_once(self, limit: int) -> Bools:
        """bool[n]: which examples find what they share already computed, in units of that size."""
        once = self.shared > 0
        for first, _ in self.units(limit):
            once[first] = False
        return once

    def _cut(self, first: int, last: int, limit: int) -> int:
        """Where a tree that is too large is cut: where least is shared, in the second half of the
        `limit` tokens that a part may have.
        """
        added = self.lengths[first:last] - self.shared[first:last]
        added[0] = self.lengths[first]
        sizes = np.cumsum(added)  # of 1, 2, ... of them
        most = int(np.searchsorted(sizes, limit, side="right"))
        most = max(1, most)
        half = int(np.searchsorted(sizes, limit / 2)) + 1
        fewest = min(half, most)
        counts = np.arange(fewest, most + 1)
        shared = self.shared[first + counts]
        least = np.flatnonzero(shared == shared.min())
        return first + int(counts[least[-1]])


def shared_packs(
    plan: Plan,
    step: int,
    tokens_per_pack: int,
    world_size: int,
    examples: Mapping[int, Example],
) -> list[list[Members]]:
    """For every rank, its packs; equally many on each. `examples` holds those of the step, by
    their number.

    Where nothing is worth sharing, these are the packs of `plan.packs`.
    """
    found = _in_shared_order(plan, step, examples)
    if found is None:
        return _plain_packs(plan, step, tokens_per_pack, world_size)
    # No pack is larger than the longest example makes one anyway.
    most = max(tokens_per_pack, int(plan.lengths.max()))
    if world_size == 1:
        _, ranks = _dealt(found, found.units(most), tokens_per_pack, 1)
        return ranks
    trees = found.trees()
    share_of_work = sum(found.costs(*tree) for tree in trees) / world_size
    share_of_tokens = sum(found.tokens(*tree) for tree in trees) / world_size
    best: list[list[Members]] = []
    least = np.inf
    for parts in FINER:
        limit = max(1, min(most, int(share_of_tokens / parts)))
        busiest, ranks = _dealt(found, found.units(limit), tokens_per_pack, world_size)
        if busiest < least:
            least = busiest
            best = ranks
        if least <= EVEN * share_of_work:
            break
    return best


def _in_shared_order(
    plan: Plan,
    step: int,
    examples: Mapping[int, Example],
) -> SharedStep | None:
    """None where nothing is worth sharing."""
    chosen = plan.examples(step)
    tokens = [examples[number].ids for number in chosen.tolist()]
    found = shared_order(tokens)
    if found is None:
        return None
    order, shared = found
    chosen = chosen[order]
    targets = np.zeros(len(chosen))  # of each example, in what it shares
    for place in np.flatnonzero(shared).tolist():
        weights = examples[int(chosen[place])].weights
        targets[place] = np.count_nonzero(weights[: shared[place]])
    length = shared.astype(np.float64)
    saved = plan.cost(length, targets, length**2)
    return SharedStep(chosen, plan.lengths[chosen], shared, plan.work[chosen], saved)


def _dealt(
    found: SharedStep, units: list[Unit], tokens_per_pack: int, world_size: int
) -> tuple[float, list[list[Members]]]:
    """The work of the busiest rank, and the packs of all."""
    tokens = [found.tokens(*unit) for unit in units]
    work = np.array([found.costs(*unit) for unit in units])
    busiest = 0.0
    packs: list[list[Members]] = []
    for bins in balanced(tokens, tokens_per_pack, world_size, work):
        load = sum(float(work[list(some)].sum()) for some in bins)
        busiest = max(busiest, load)
        of_rank = [_members(found, [units[u] for u in some]) for some in bins]
        packs.append(of_rank)
    return busiest, packs


def _members(found: SharedStep, units: list[Unit]) -> Members:
    """A pack of units that stand in shared order."""
    places: list[int] = []
    for first, last in units:
        places += range(first, last)
    shared = [0]
    for before, place in pairwise(places):
        common = found.shared[before + 1 : place + 1]
        shared.append(int(common.min()))
    numbers = tuple(int(found.examples[place]) for place in places)
    if not any(shared):
        return Members(numbers)
    return Members(numbers, tuple(shared))
