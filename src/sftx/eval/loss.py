"""Held-out loss and accuracy: one sum over all targets divided by one sum of weights, however the
rows are cut into packs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from sftx import distributed
from sftx.data.pack import balanced, build_pack, like_lengths
from sftx.data.store.corpus import Corpus
from sftx.model.checks.start import evaluating
from sftx.model.context_parallel import Context, group_and_count
from sftx.model.pack_loss import PackLoss, Tally, to_tensors


def held_out_loss(
    model: PackLoss,
    corpus: Corpus,
    tokens_per_pack: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    context: Context | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """`loss` in nats per unit of weight, `perplexity` = exp(loss), the `targets` it stands on, and
    `accuracy`: the share of their weight whose argmax is right.

    With several sources, `loss of NAME` and `accuracy of NAME` are those of each. `stop` is asked
    between packs; where it says so, the numbers so far are thrown away and {} is returned. `tell`
    is told how many packs of this rank are done, of about how many.
    """
    device = next(model.parameters()).device
    totals = torch.zeros(len(corpus.sources), dtype=torch.float64, device=device)
    tallies = [Tally(device) for _ in corpus.sources]
    weights = [
        float(corpus.weights[corpus.source == number].sum())
        for number in range(len(corpus.sources))
    ]
    group, groups = group_and_count(context)
    total = math.ceil(float(corpus.lengths.sum()) / (tokens_per_pack * groups))
    done = 0
    cut = like_lengths if model.paths.padded else balanced
    with evaluating(model), torch.no_grad():
        for number in range(len(corpus.sources)):
            mine = np.flatnonzero(corpus.source == number)
            for members in cut(corpus.lengths[mine], tokens_per_pack, groups)[group]:
                if stop():
                    return {}
                tell(done, max(total, done))
                done += 1
                pack = build_pack([corpus.example(int(mine[i])) for i in members])
                with autocast():
                    tensors = to_tensors(pack, device, context)
                    totals[number] += model(tensors, tallies[number]).double()
    both = torch.stack([totals, torch.stack([tally.correct for tally in tallies])])
    sums, correct = distributed.all_reduce_sum(both).tolist()
    return _numbers(corpus, sums, correct, weights)


def _numbers(
    corpus: Corpus, sums: list[float], correct: list[float], weights: list[float]
) -> dict[str, float]:
    """What is said of the rows, from the sums over the targets of each source."""
    loss = sum(sums) / sum(weights)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    numbers = {"loss": loss, "perplexity": perplexity, "targets": float(corpus.targets.sum())}
    numbers["accuracy"] = sum(correct) / sum(weights)
    if len(corpus.sources) > 1:
        numbers |= _of_each_source("loss", corpus, sums, weights)
        numbers |= _of_each_source("accuracy", corpus, correct, weights)
    return numbers


def _of_each_source(
    what: str, corpus: Corpus, sums: list[float], weights: list[float]
) -> dict[str, float]:
    """`loss of NAME`, say, of every source that has a weight."""
    parts = zip(corpus.sources, sums, weights, strict=True)
    return {f"{what} of {name}": part / weight for name, part, weight in parts if weight}
