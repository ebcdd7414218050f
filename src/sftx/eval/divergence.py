"""How far two models are apart on answers that are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sftx.eval.forgetting import Continuation, Gauge

Forward = Callable[[Tensor], Tensor]
"""From ids int64[1, T] to logits [1, T, V]."""


def divergence(tuned: Forward, base: Forward, said: Sequence[Continuation]) -> float:
    """KL(tuned || base) in nats, the mean over all tokens of answers that are given."""

    def of(model: Forward, continuation: Continuation) -> Tensor:
        ids = torch.tensor([continuation.prompt + continuation.said])
        first = max(len(continuation.prompt), 1)  # nothing stands before the first token of a text
        with torch.no_grad():
            return torch.log_softmax(model(ids)[0, first - 1 : -1].double(), dim=-1)

    gauge = Gauge(list(said), lambda number: of(base, said[number]))
    return gauge.kl(lambda continuation: of(tuned, continuation))
