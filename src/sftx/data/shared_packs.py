"""Placing the examples of a step into packs, so that those which share a prefix share a pack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sftx.data.pack import Float64, balanced
from sftx.data.plan import Plan
from sftx.data.prefixes import Int64, build_shared_pack, shared_order
from sftx.data.store.corpus import Corpus
from sftx.evenly import evenly
from sftx.types import Example, Pack

FINER = (1, 2, 4, 8)
"""Into how many units the share of a rank is cut at least: finer ones can be dealt more equally,
and compute more prefixes again.
"""
EVEN = 1.02
"""The work of the busiest rank, by that of an average one, with which no finer cut is tried."""


SAMPLE = 20
"""Steps that are looked at to tell what sharing saves."""


class Members(NamedTuple):
    """The examples of a pack, and how many tokens each shares with the one before it (empty:
    nothing is shared).
    """

    examples: tuple[int, ...]
    shared: tuple[int, ...] = ()

    def build(self, read: Callable[[int], Example]) -> Pack:
        """The pack, whose examples `read` gives by their numbers."""
        return build_shared_pack([read(i) for i in self.examples], self.examples, self.shared)


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

    @property
    def share(self) -> float:
        """The share of the tokens that need not be computed."""
        return self.saved_tokens / max(self.tokens, 1.0)

    @property
    def work_share(self) -> float:
        """The share of the work that need not be done."""
        return self.saved_work / max(self.work, 1.0)

    def notes(self) -> list[str]:
        """What a run says of it."""
        if not self.saved_tokens:
            return []
        return [f"shared prefixes are computed once: {self.share:.0%} of the tokens are saved"]

    @property
    def prefix(self) -> int:
        """Tokens of the prefix that an average saved token stands in."""
        return round(self.saved_squares / max(self.saved_tokens, 1.0))


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
    squares = plan.lengths.astype(np.float64) ** 2
    sums = np.zeros(6)
    for step in evenly(plan.num_steps, SAMPLE):
        examples, chosen = _examples(plan, corpus, step), plan.examples(step)
        sums[::2] += [x[chosen].sum() for x in (plan.lengths, squares, plan.work)]
        for members in shared_packs(plan, step, tokens_per_pack, 1, examples)[0]:
            shared = np.array(members.shared, np.float64)
            saved = _saved_work(plan, members, examples)
            sums[1::2] += [shared.sum(), (shared**2).sum(), saved.sum()]
    return Saving(*sums.tolist())


def _examples(plan: Plan, corpus: Corpus, step: int) -> dict[int, Example]:
    return {i: corpus.example(i) for i in plan.examples(step).tolist()}


def _plain_packs(
    plan: Plan, step: int, tokens_per_pack: int, world_size: int, padded: bool = False
) -> list[list[Members]]:
    plain = plan.packs(step, tokens_per_pack, world_size, padded)
    return [[Members(members) for members in bins] for bins in plain]


def _saved_work(plan: Plan, members: Members, examples: Mapping[int, Example]) -> Float64:
    """float64[n]: the work that each example is spared behind the one before it."""
    shared = np.array(members.shared, np.int64)
    targets = np.zeros(len(shared))
    for k in np.flatnonzero(shared).tolist():
        targets[k] = np.count_nonzero(examples[members.examples[k]].weights[: shared[k]])
    tokens = shared.astype(np.float64)
    return plan.cost(tokens, targets, tokens**2)


@dataclass(frozen=True, slots=True, eq=False)
class SharedStep:
    """The examples of a step in shared order: int64[n], and what each costs alone and saves behind
    the one before it.
    """

    examples: Int64
    lengths: Int64
    shared: Int64
    work: Float64
    saved: Float64

    def tokens(self, first: int, last: int) -> int:
        """Tokens that examples `first` up to `last` take in one pack."""
        return int(self.lengths[first:last].sum() - self.shared[first + 1 : last].sum())

    def costs(self, first: int, last: int) -> float:
        """Work that they take in one pack."""
        return float(self.work[first:last].sum() - self.saved[first + 1 : last].sum())


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
    if not found.shared.any():
        return _plain_packs(plan, step, tokens_per_pack, world_size)
    # No pack is larger than the longest example makes one anyway.
    most = max(tokens_per_pack, int(plan.lengths.max()))
    if world_size == 1:
        return _dealt(found, _units(found, most), tokens_per_pack, 1)[1]
    whole = sum(found.costs(a, b) for a, b in _trees(found.shared))
    share = sum(found.tokens(a, b) for a, b in _trees(found.shared)) / world_size
    best, busiest = None, np.inf
    for parts in FINER:
        units = _units(found, max(1, min(most, int(share / parts))))
        load, ranks = _dealt(found, units, tokens_per_pack, world_size)
        if load < busiest:
            best, busiest = ranks, load
        if busiest <= EVEN * whole / world_size:
            break
    assert best is not None
    return best


def _in_shared_order(plan: Plan, step: int, examples: Mapping[int, Example]) -> SharedStep:
    chosen = plan.examples(step)
    order, shared = shared_order([examples[i].ids for i in chosen.tolist()])
    chosen = chosen[order]
    saved = _saved_work(plan, Members(tuple(chosen.tolist()), tuple(shared.tolist())), examples)
    return SharedStep(chosen, plan.lengths[chosen], shared, plan.work[chosen], saved)


def _trees(shared: Int64) -> Iterable[tuple[int, int]]:
    """(first, one past the last) of the examples of every tree."""
    return pairwise([*np.flatnonzero(shared == 0).tolist(), len(shared)])


def _units(found: SharedStep, limit: int) -> list[tuple[int, int]]:
    """Examples that stay together: whole trees of at most `limit` tokens, and parts of larger
    ones.
    """
    units: list[tuple[int, int]] = []
    for first, last in _trees(found.shared):
        while found.tokens(first, last) > limit and last - first > 1:
            cut = _cut(found, first, last, limit)
            units.append((first, cut))
            first = cut
        units.append((first, last))
    return units


def _cut(found: SharedStep, first: int, last: int, limit: int) -> int:
    """Where a tree that is too large is cut: where least is shared, in the second half of the
    `limit` tokens that a part may have.
    """
    own = found.lengths[first + 1 : last] - found.shared[first + 1 : last]
    sizes = int(found.lengths[first]) + np.concatenate(
        [[0], np.cumsum(own)]
    )  # of 1, 2, ... of them
    fitting = max(1, int(np.searchsorted(sizes, limit, side="right")))
    fewest = min(fitting, int(np.searchsorted(sizes, limit / 2)) + 1)
    counts = np.arange(fewest, fitting + 1)
    least = found.shared[first + counts]
    return first + int(counts[np.flatnonzero(least == least.min())[-1]])


def _dealt(
    found: SharedStep, units: list[tuple[int, int]], tokens_per_pack: int, world_size: int
) -> tuple[float, list[list[Members]]]:
    """The work of the busiest rank, and the packs of all."""
    tokens = [found.tokens(a, b) for a, b in units]
    work = np.array([found.costs(a, b) for a, b in units])
    ranks = balanced(tokens, tokens_per_pack, world_size, work if world_size > 1 else None)
    packs = [[_members(found, [units[u] for u in some]) for some in bins] for bins in ranks]
    loads = [sum(float(work[list(some)].sum()) for some in bins) for bins in ranks]
    return max(loads), packs


def _members(found: SharedStep, units: list[tuple[int, int]]) -> Members:
    """A pack of units that stand in shared order."""
    places = [k for first, last in units for k in range(first, last)]
    shared = [int(found.shared[a + 1 : b + 1].min()) for a, b in pairwise(places)]
    numbers = tuple(int(found.examples[k]) for k in places)
    return Members(numbers, (0, *shared) if any(shared) else ())
