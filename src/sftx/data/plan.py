"""The plan: which examples every step of a run trains on, known before the first one.

A pure function of the corpus, `batch` and `seed`. Nothing about the machine enters `examples` or
`total_weight`; pack size and number of processes only decide how a step is cut, in `packs`. So
resuming needs one integer, and the step's divisor needs no communication.
"""

from __future__ import annotations

import hashlib
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sftx.data.groups import ends_of, grouped, groups_of
from sftx.data.pack import Bins, Float64, balanced, batch_tokens, like_lengths
from sftx.data.rotation import Int64, Rotation
from sftx.data.store.corpus import Corpus
from sftx.settings.schema import Batch, Config
from sftx.types import Int32, UserError


def plan_of(corpus: Corpus, config: Config) -> Plan:
    """The plan of a run over `corpus`, whose ledgers then know how many rows it shows."""
    plan = Plan(
        corpus.lengths,
        corpus.weights,
        config.batch,
        config.seed,
        corpus.rotations,
        groups_of(corpus, config.batch.group_by),
    )
    corpus.count_shown(plan.shown())
    return plan


Cost = Callable[[Float64, Float64, Float64], Float64]


def count_tokens(tokens: Float64, _targets: Float64, _squares: Float64) -> Float64:
    """The cost of tokens where no model is known: their number."""
    return tokens


class Plan:
    """Steps of a run over examples of the given `lengths` (tokens) and `weights` (sum of target
    weights).

    Examples are taken from one endless stream, epoch after epoch, each epoch in its own order;
    steps are consecutive cuts of that stream. The last step takes what is left. An epoch shows
    every example once, but of those in `rotations` a share, another one each time.

    With `groups`, int64[N], examples of one number stand together in each epoch, and a step takes
    whole groups: it ends before one that does not fit, unless that alone is too large for a step.
    """

    def __init__(
        self,
        lengths: Int32,
        weights: Float64,
        batch: Batch,
        seed: int,
        rotations: Sequence[Rotation] = (),
        groups: Int64 | None = None,
    ) -> None:
        if len(lengths) == 0:
            raise UserError("there is nothing to train on: the data holds no examples")
        self.lengths = np.asarray(lengths, np.int64)
        self.weights = np.asarray(weights, np.float64)
        self.batch = batch
        self.seed = seed
        self.work: Float64 = self.lengths.astype(np.float64)
        """What each example costs to compute, in any unit; ranks are dealt equal sums of it."""
        self.cost: Cost = count_tokens
        """What tokens cost in the same unit, from their number, that of their targets, and the
        square of their number.
        """
        self.groups = groups
        self.shares: Float64 = np.ones(len(self.lengths))
        """How often an epoch shows each example, on average."""
        self._rotations = tuple(rotations)
        always = np.ones(len(self.lengths), np.bool_)
        for rotation in self._rotations:
            self.shares[rotation.order] = rotation.share()
            always[rotation.order] = False
        self._always: Int64 = np.flatnonzero(always)
        self._order = lru_cache(maxsize=4)(self._shuffled)
        self._epochs = [0]  # where in the stream epochs begin, as far as that is worked out
        self._starts = self._cut()

    @property
    def num_steps(self) -> int:
        """Optimiser steps in the run."""
        return len(self._starts) - 1

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the steps; a run may be continued only under the same
        one.
        """
        arrays = b"".join(array.tobytes() for array in (self.lengths, self.weights, self._starts))
        state = b"".join(rotation.state() for rotation in self._rotations)
        decides = arrays + f"{self.seed} {self.batch.shuffle}".encode() + state
        if self.groups is not None:
            decides += self.groups.tobytes()
        return hashlib.blake2b(decides, digest_size=16).hexdigest()

    def examples(self, step: int) -> Int64:
        """Indices of the examples of `step` (0-based), in stream order; int64[examples in the
        step].
        """
        return self._stream(int(self._starts[step]), int(self._starts[step + 1]))

    def total_weight(self, step: int) -> float:
        """The step's divisor: the weights of all its targets, over all packs and processes, summed
        in float64.
        """
        return float(self.weights[self.examples(step)].sum())

    def epoch(self, step: int) -> float:
        """Epochs completed once `step` is done."""
        position = int(self._starts[step + 1])
        if not self._rotations:
            return float(position / len(self.lengths))
        epoch = self._epoch_at(position)
        begin, end = self._begin(epoch), self._begin(epoch + 1)
        return epoch + (position - begin) / (end - begin)

    def shown(self) -> NDArray[np.bool_]:
        """bool[examples]: those that at least one step shows."""
        shown = np.zeros(len(self.lengths), np.bool_)
        epoch, end = 0, int(self._starts[-1])
        while self._begin(epoch) < end and not shown.all():
            shown[self._order(epoch)[: end - self._begin(epoch)]] = True
            epoch += 1
        return shown

    def packs(
        self, step: int, tokens_per_pack: int, world_size: int = 1, padded: bool = False
    ) -> list[Bins]:
        """For every rank, its packs as tuples of example indices; equally many on each rank. With
        `padded` each is to run as a right-padded batch.
        """
        chosen = self.examples(step)
        if padded:
            ranks = like_lengths(self.lengths[chosen], tokens_per_pack, world_size)
            return [[tuple(int(chosen[i]) for i in members) for members in bins] for bins in ranks]
        # One process has nobody to wait for: there equal tokens are better, which make the largest
        # pack smallest.
        work = self.work[chosen] if world_size > 1 else None
        ranks = balanced(self.lengths[chosen], tokens_per_pack, world_size, work)
        return [[tuple(int(chosen[i]) for i in members) for members in bins] for bins in ranks]

    def padding(self, tokens_per_pack: int, world_size: int = 1) -> float:
        """The share of right-padded batches that is padding, in the first (at most 50) steps."""
        tokens = padded = 0
        for step in range(min(self.num_steps, 50)):
            tokens += int(self.lengths[self.examples(step)].sum())
            for bins in self.packs(step, tokens_per_pack, world_size, padded=True):
                padded += sum(batch_tokens(self.lengths, members) for members in bins)
        return 1 - tokens / padded if padded else 0.0

    def _shuffled(self, epoch: int) -> Int64:
        members = self._always
        if self._rotations:
            shares = [rotation.members(epoch) for rotation in self._rotations]
            members = np.sort(np.concatenate([members, *shares]))
        # RandomState, not Generator: numpy promises that its stream never changes between releases.
        random = np.random.RandomState([self.seed % 2**32, epoch])
        if self.groups is not None:
            return members[grouped(self.groups[members], random if self.batch.shuffle else None)]
        if not self.batch.shuffle:
            return members
        return members[random.permutation(len(members))]

    def _stream(self, start: int, stop: int) -> Int64:
        epochs = range(self._epoch_at(start), self._epoch_at(stop - 1) + 1)
        parts = [
            self._order(e)[max(start - self._begin(e), 0) : stop - self._begin(e)] for e in epochs
        ]
        return np.concatenate(parts)

    def _begin(self, epoch: int) -> int:
        """Where in the stream an epoch begins."""
        if not self._rotations:
            return epoch * len(self.lengths)
        while len(self._epochs) <= epoch:
            self._epochs.append(self._epochs[-1] + len(self._order(len(self._epochs) - 1)))
        return self._epochs[epoch]

    def _epoch_at(self, position: int) -> int:
        """The epoch in which a position of the stream lies."""
        if not self._rotations:
            return position // len(self.lengths)
        while self._epochs[-1] <= position:
            self._begin(len(self._epochs))
        return bisect_right(self._epochs, position) - 1

    def _end_of(self, epochs: float) -> int:
        """The position in the stream after so many epochs."""
        if not self._rotations:
            return max(1, round(epochs * len(self.lengths)))
        whole = int(epochs)
        begin, end = self._begin(whole), self._begin(whole + 1)
        return max(1, begin + round((epochs - whole) * (end - begin)))

    def _cut(self) -> Int64:
        """Positions in the stream where steps begin, and the end; int64[num_steps + 1]."""
        batch = self.batch
        steps = sys.maxsize if batch.steps is None else batch.steps
        total = self._end_of(batch.epochs) if batch.steps is None else sys.maxsize
        if batch.tokens_per_step is None and self.groups is None:
            size = batch.examples_per_step
            return np.minimum(
                np.arange(min(steps, -(-total // size)) + 1, dtype=np.int64) * size, total
            )
        if batch.tokens_per_step is None:
            return self._filled(batch.examples_per_step, np.ones_like(self.lengths), steps, total)
        return self._filled(batch.tokens_per_step, self.lengths, steps, total)

    def _filled(self, room: int, sizes: Int64, steps: int, total: int) -> Int64:
        """The same where a step has `room` for examples of these `sizes`, and takes whole groups."""
        starts = [0]
        # `ends` holds the running sum of the epochs looked at so far, `bounds` where their groups
        # end; they grow as steps need it.
        ends, bounds, epoch = np.cumsum(sizes[self._order(0)]), self._bounds(0), 1
        while len(starts) <= steps and starts[-1] < total:
            start = starts[-1]
            while len(ends) < start + len(self.lengths):
                more = np.cumsum(sizes[self._order(epoch)])
                bounds = np.concatenate([bounds, len(ends) + self._bounds(epoch)])
                ends, epoch = np.concatenate([ends, ends[-1] + more]), epoch + 1
            budget = room + (int(ends[start - 1]) if start else 0)
            end = min(max(start + 1, int(np.searchsorted(ends, budget, side="right"))), total)
            groups = bisect_right(bounds, end)
            whole = int(bounds[groups - 1]) if groups else 0
            starts.append(whole if whole > start else end)
        return np.array(starts, dtype=np.int64)

    def _bounds(self, epoch: int) -> Int64:
        """Where in an epoch groups end; nothing where there are none."""
        if self.groups is None:
            return np.zeros(0, np.int64)
        return ends_of(self.groups[self._order(epoch)])
