"""How far a tuned model has moved from its base, on what it says itself.

KL(tuned || base) per token, over the whole vocabulary, on the answers of the tuned model. It predicts
how much a model forgets (arXiv:2509.04259): 0 where the two say the same with the same certainty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""From ids int64[1, T] to logits [1, T, V]."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model was asked and what it said, as token ids; `said` is not empty."""

    prompt: list[int]
    said: list[int]


def divergence(tuned: Forward, base: Forward, continuations: Sequence[Continuation]) -> float:
    """KL(tuned || base) in nats, the mean over all tokens said: sum_v p(v) (log p(v) - log q(v)).

    Both distributions are computed in float64 from the logits before each token. 0.0 where nothing
    was said.
    """
    total = 0.0
    tokens = 0
    for continuation in continuations:
        ids = torch.tensor([continuation.prompt + continuation.said])
        first = max(len(continuation.prompt), 1)  # nothing stands before the first token of a text
        with torch.no_grad():
            log_p = _log_probabilities(tuned(ids), first)
            log_q = _log_probabilities(base(ids), first)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += log_p.shape[0]
    return total / max(tokens, 1)


def _log_probabilities(logits: Tensor, first: int) -> Tensor:
    """float64[said, V] of the tokens from position `first` on."""
    return torch.log_softmax(logits[0, first - 1 : -1].double(), dim=-1)
