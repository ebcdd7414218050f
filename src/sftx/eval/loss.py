"""Held-out loss: one sum over all targets divided by one sum of weights, however the rows are cut into packs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from sftx.data.corpus import Corpus
from sftx.data.pack import best_fit, build_pack
from sftx.model.load import PackLoss, to_tensors


def held_out_loss(
    model: PackLoss,
    corpus: Corpus,
    tokens_per_pack: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """`loss` in nats per unit of weight, `perplexity` = exp(loss), and the `targets` it stands on.

    `stop` is asked between packs; where it says so, the numbers so far are thrown away and {} is returned.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for members in best_fit(corpus.lengths, tokens_per_pack):
                if stop():
                    return {}
                pack = build_pack([corpus.example(i) for i in members])
                with autocast():
                    total += model(**to_tensors(pack, device)).double()
    finally:
        model.train(was_training)
    loss = float(total) / float(corpus.weights.sum())
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "targets": float(corpus.targets.sum())}
