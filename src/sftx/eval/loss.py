"""Held-out loss: one sum over all targets divided by one sum of weights, however the rows are cut
into packs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from sftx import distributed
from sftx.data.pack import balanced, build_pack
from sftx.data.store.corpus import Corpus
from sftx.model.checks.start import evaluating
from sftx.model.pack_loss import PackLoss, to_tensors


def held_out_loss(
    model: PackLoss,
    corpus: Corpus,
    tokens_per_pack: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """`loss` in nats per unit of weight, `perplexity` = exp(loss), and the `targets` it stands on.

    With several sources, `loss of NAME` is that of each. `stop` is asked between packs; where it
    says so, the numbers so far are thrown away and {} is returned. `tell` is told how many packs of
    this rank are done, of about how many.
    """
    device = next(model.parameters()).device
    totals = torch.zeros(len(corpus.sources), dtype=torch.float64, device=device)
    weights = [
        float(corpus.weights[corpus.source == number].sum())
        for number in range(len(corpus.sources))
    ]
    share = tokens_per_pack * distributed.world_size()
    total = math.ceil(float(corpus.lengths.sum()) / share)
    done = 0
    with evaluating(model), torch.no_grad():
        for number in range(len(corpus.sources)):
            mine = np.flatnonzero(corpus.source == number)
            for members in balanced(
                corpus.lengths[mine], tokens_per_pack, distributed.world_size()
            )[distributed.rank()]:
                if stop():
                    return {}
                tell(done, max(total, done))
                done += 1
                pack = build_pack([corpus.example(int(mine[i])) for i in members])
                with autocast():
                    totals[number] += model(to_tensors(pack, device)).double()
    sums = distributed.all_reduce_sum(totals).tolist()
    loss = sum(sums) / sum(weights)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    numbers = {"loss": loss, "perplexity": perplexity, "targets": float(corpus.targets.sum())}
    if len(corpus.sources) > 1:
        named = zip(corpus.sources, sums, weights, strict=True)
        numbers |= {f"loss of {name}": total / weight for name, total, weight in named if weight}
    return numbers
