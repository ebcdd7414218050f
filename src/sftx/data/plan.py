"""The plan: which examples every step of a run trains on, known before the first one.

A pure function of the corpus, `batch` and `seed`. Nothing about the machine enters `examples` or `total_weight`; pack
size and number of processes only decide how a step is cut, in `packs`. So resuming needs one integer, and the step's
divisor needs no communication.
"""

from __future__ import annotations

import hashlib
import sys
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sftx.config import Batch
from sftx.data.pack import Bins, Float64, balanced
from sftx.types import Int32, UserError

Int64 = NDArray[np.int64]


class Plan:
    """Steps of a run over examples of the given `lengths` (tokens) and `weights` (sum of target weights).

    Examples are taken from one endless stream, epoch after epoch, each epoch in its own order; steps are consecutive
    cuts of that stream. The last step takes what is left.
    """

    def __init__(self, lengths: Int32, weights: Float64, batch: Batch, seed: int) -> None:
        if len(lengths) == 0:
            raise UserError("there is nothing to train on: the data holds no examples")
        self.lengths = np.asarray(lengths, np.int64)
        self.weights = np.asarray(weights, np.float64)
        self.batch = batch
        self.seed = seed
        self.work: Float64 = self.lengths.astype(np.float64)
        """What each example costs to compute, in any unit; ranks are dealt equal sums of it."""
        self._order = lru_cache(maxsize=4)(self._shuffled)
        self._starts = self._cut()

    @property
    def num_steps(self) -> int:
        """Optimiser steps in the run."""
        return len(self._starts) - 1

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the steps; a run may be continued only under the same one."""
        arrays = b"".join(array.tobytes() for array in (self.lengths, self.weights, self._starts))
        return hashlib.blake2b(arrays + f"{self.seed} {self.batch.shuffle}".encode(), digest_size=16).hexdigest()

    def examples(self, step: int) -> Int64:
        """Indices of the examples of `step` (0-based), in stream order; int64[examples in the step]."""
        return self._stream(int(self._starts[step]), int(self._starts[step + 1]))

    def total_weight(self, step: int) -> float:
        """The step's divisor: the weights of all its targets, over all packs and processes, summed in float64."""
        return float(self.weights[self.examples(step)].sum())

    def epoch(self, step: int) -> float:
        """Epochs completed once `step` is done."""
        return float(self._starts[step + 1] / len(self.lengths))

    def packs(self, step: int, tokens_per_pack: int, world_size: int = 1) -> list[Bins]:
        """For every rank, its packs as tuples of example indices; equally many on each rank."""
        chosen = self.examples(step)
        # One process has nobody to wait for: there equal tokens are better, which make the largest pack smallest.
        work = self.work[chosen] if world_size > 1 else None
        ranks = balanced(self.lengths[chosen], tokens_per_pack, world_size, work)
        return [[tuple(int(chosen[i]) for i in members) for members in bins] for bins in ranks]

    def _shuffled(self, epoch: int) -> Int64:
        count = len(self.lengths)
        if not self.batch.shuffle:
            return np.arange(count, dtype=np.int64)
        # RandomState, not Generator: numpy promises that its stream never changes between releases.
        return np.random.RandomState([self.seed % 2**32, epoch]).permutation(count).astype(np.int64)

    def _stream(self, start: int, stop: int) -> Int64:
        count = len(self.lengths)
        epochs = range(start // count, (stop - 1) // count + 1)
        return np.concatenate([self._order(e)[max(start - e * count, 0) : stop - e * count] for e in epochs])

    def _cut(self) -> Int64:
        """Positions in the stream where steps begin, and the end; int64[num_steps + 1]."""
        batch, count = self.batch, len(self.lengths)
        steps = sys.maxsize if batch.steps is None else batch.steps
        total = max(1, round(batch.epochs * count)) if batch.steps is None else sys.maxsize
        if batch.tokens_per_step is None:
            size = batch.examples_per_step
            return np.minimum(np.arange(min(steps, -(-total // size)) + 1, dtype=np.int64) * size, total)
        starts = [0]
        # `ends` holds the running token count of the epochs looked at so far; it grows as steps need it.
        ends = np.cumsum(self.lengths[self._order(0)])
        while len(starts) <= steps and starts[-1] < total:
            start = starts[-1]
            while len(ends) < start + count:
                more = np.cumsum(self.lengths[self._order(len(ends) // count)])
                ends = np.concatenate([ends, ends[-1] + more])
            budget = batch.tokens_per_step + (int(ends[start - 1]) if start else 0)
            starts.append(min(max(start + 1, int(np.searchsorted(ends, budget, side="right"))), total))
        return np.array(starts, dtype=np.int64)
