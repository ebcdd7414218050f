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

from sftx.data.groups import ends_of, grouped, groups_of
from sftx.data.pack import Bins, balanced, batch_tokens, like_lengths, rounded_up
from sftx.data.rotation import Rotation
from sftx.data.store.corpus import Corpus
from sftx.settings.schema import Batch, Config
from sftx.types import Bools, Float64, Int32, Int64, UserError


def plan_of(corpus: Corpus, config: Config) -> Plan:
    """The plan of a run over `corpus`, whose ledgers then know how many rows it shows."""
    batch = config.batch
    groups = groups_of(corpus, batch.group_by)
    plan = Plan(corpus.lengths, corpus.weights, batch, config.seed, corpus.rotations, groups)
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
        content = hashlib.blake2b(digest_size=16)
        for array in (self.lengths, self.weights, self._starts):
            content.update(array.tobytes())
        content.update(f"{self.seed} {self.batch.shuffle}".encode())
        for rotation in self._rotations:
            content.update(rotation.state())
        if self.groups is not None:
            content.update(self.groups.tobytes())
        return content.hexdigest()

    def examples(self, step: int) -> Int64:
        """Indices of the examples of `step` (0-based), in stream order; int64[examples in the
        step].
        """
        start = int(self._starts[step])
        stop = int(self._starts[step + 1])
        return self._stream(start, stop)

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
        begin = self._begin(epoch)
        end = self._begin(epoch + 1)
        return epoch + (position - begin) / (end - begin)

    def shown(self) -> Bools:
        """bool[examples]: those that at least one step shows."""
        shown = np.zeros(len(self.lengths), np.bool_)
        epoch = 0
        end = int(self._starts[-1])
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
        lengths = self.lengths[chosen]
        if padded:
            ranks = like_lengths(lengths, tokens_per_pack, world_size)
        else:
            ranks = balanced(lengths, tokens_per_pack, world_size, self.work[chosen])
        packs: list[Bins] = []
        for bins in ranks:
            packs.append([tuple(chosen[list(members)].tolist()) for members in bins])
        return packs

    def padding(self, tokens_per_pack: int, world_size: int = 1) -> float:
        """The share of right-padded batches that is padding, in the first (at most 50) steps."""
        tokens = 0
        padded = 0
        for step in range(min(self.num_steps, 50)):
            tokens += int(self.lengths[self.examples(step)].sum())
            for bins in self.packs(step, tokens_per_pack, world_size, padded=True):
                padded += sum(batch_tokens(self.lengths, members) for members in bins)
        if not padded:
            return 0.0
        return 1 - tokens / padded

    def _shuffled(self, epoch: int) -> Int64:
        """The examples of an epoch, in its order."""
        members = self._always
        if self._rotations:
            shares = [rotation.members(epoch) for rotation in self._rotations]
            members = np.sort(np.concatenate([members, *shares]))
        # RandomState, not Generator: numpy promises that its stream never changes between releases.
        random = np.random.RandomState([self.seed % 2**32, epoch])
        if self.groups is not None:
            shuffle = random if self.batch.shuffle else None
            return members[grouped(self.groups[members], shuffle)]
        if self.batch.shuffle:
            return members[random.permutation(len(members))]
        return members

    def _stream(self, start: int, stop: int) -> Int64:
        """The examples at the positions from `start` to before `stop`."""
        first = self._epoch_at(start)
        last = self._epoch_at(stop - 1)
        parts: list[Int64] = []
        for epoch in range(first, last + 1):
            begin = self._begin(epoch)
            order = self._order(epoch)
            parts.append(order[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts)

    def _begin(self, epoch: int) -> int:
        """Where in the stream an epoch begins."""
        if not self._rotations:
            return epoch * len(self.lengths)
        while len(self._epochs) <= epoch:
            newest = len(self._epochs) - 1
            size = len(self._order(newest))
            self._epochs.append(self._epochs[newest] + size)
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
        begin = self._begin(whole)
        size = self._begin(whole + 1) - begin
        return max(1, begin + round((epochs - whole) * size))

    def _cut(self) -> Int64:
        """Positions in the stream where steps begin, and the end; int64[num_steps + 1]."""
        batch = self.batch
        steps = total = sys.maxsize
        if batch.steps is None:
            total = self._end_of(batch.epochs)
        else:
            steps = batch.steps
        if batch.tokens_per_step is not None:
            return self._filled(batch.tokens_per_step, self.lengths, steps, total)
        size = batch.examples_per_step
        if self.groups is not None:
            return self._filled(size, np.ones_like(self.lengths), steps, total)
        count = min(steps, rounded_up(total, size))
        starts = np.arange(count + 1, dtype=np.int64) * size
        return np.minimum(starts, total)

    def _filled(self, room: int, sizes: Int64, steps: int, total: int) -> Int64:
        """The same where a step has `room` for examples of these `sizes`, and takes whole groups."""
        starts = [0]
        # Of the epochs looked at so far; steps that need more make them grow.
        sums: Int64 = np.append(0, np.cumsum(sizes[self._order(0)]))
        bounds = np.append(0, self._bounds(0))
        epochs = 1
        while len(starts) <= steps and starts[-1] < total:
            start = starts[-1]
            budget = int(sums[start]) + room
            while sums[-1] <= budget and len(sums) <= total:
                bounds = np.append(bounds, len(sums) - 1 + self._bounds(epochs))
                more = np.cumsum(sizes[self._order(epochs)])
                sums = np.append(sums, sums[-1] + more)
                epochs += 1
            end = int(np.searchsorted(sums, budget, side="right")) - 1
            end = max(end, start + 1)  # one example that is too large is a step by itself
            end = min(end, total)
            whole_groups = int(bounds[bisect_right(bounds, end) - 1])
            if whole_groups > start:
                end = whole_groups
            starts.append(end)
        return np.array(starts, dtype=np.int64)

    def _bounds(self, epoch: int) -> Int64:
        """Where in an epoch groups end; nothing where there are none."""
        if self.groups is None:
            return np.zeros(0, np.int64)
        return ends_of(self.groups[self._order(epoch)])
