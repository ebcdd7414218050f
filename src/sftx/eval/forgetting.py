"""How far a tuned model has moved from its base, on what the base says itself.

The base answers the held-out prompts once, and every evaluation compares the two models before each
token of these answers: KL(tuned || base) per token, over the whole vocabulary. It predicts how much
a model forgets (arXiv:2509.04259): 0 where the two say the same with the same certainty.

    KL = mean over tokens t of sum over v of p(v | before t) (log p(v | before t) - log q(v | before t))

with p of the tuned model and q of the base. Nothing is approximated: q is kept whole, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sftx.data.pack import build_pack
from sftx.files import make_folder, sync
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.types import Example

MOST_TOKENS = 4096
"""Tokens of the base's answers that are compared."""
MOST_BYTES = 1 << 28
"""Fewer of them where the vocabulary is so large that their distributions would take more."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model was asked and what it said, as token ids; `said` is not empty."""

    prompt: list[int]
    said: list[int]


LogProbabilities = Callable[[Continuation], Tensor]
"""float32[said, V]: what a model thinks of every token of the vocabulary, before each token said."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """The answers of the base, and what it thinks before each of their tokens: `base(number)` for
    the answer of that number.
    """

    answers: list[Continuation]
    base: Callable[[int], Tensor]

    def kl(self, tuned: LogProbabilities) -> float:
        """KL(tuned || base) in nats, the mean over all tokens; 0.0 where the base says nothing."""
        total = 0.0
        tokens = 0
        for number, continuation in enumerate(self.answers):
            total += _divergence(tuned(continuation), self.base(number))
            tokens += len(continuation.said)
        return total / max(tokens, 1)


def _divergence(tuned: Tensor, base: Tensor) -> float:
    """The sum over all tokens of KL(tuned || base), computed in float64."""
    log_p = tuned.double()
    log_q = base.to(log_p.device).double()
    return float((log_p.exp() * (log_p - log_q)).sum())


def log_probabilities(loss: PackLoss, continuation: Continuation) -> Tensor:
    """float32[said, V] of the model, by the path that the trainer computes by."""
    prompt = continuation.prompt
    said = continuation.said
    ids = np.array(prompt + said, np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[len(prompt) :] = 1
    device = next(loss.parameters()).device
    pack = to_tensors(build_pack([Example(ids, weights)]), device)
    logits = loss.own_logits(pack) if loss.paths.isolate else loss.logits_one_by_one(pack)
    return torch.log_softmax(logits.double(), dim=-1).float()


def gauged(
    prompts: Sequence[list[int]], said: Sequence[list[int]], vocabulary: int
) -> list[Continuation]:
    """The first answers, as many of their tokens as may be compared."""
    room = min(MOST_TOKENS, MOST_BYTES // (4 * vocabulary))
    chosen: list[Continuation] = []
    for prompt, ids in zip(prompts, said, strict=True):
        kept = ids[:room]
        if kept and prompt:
            chosen.append(Continuation(prompt, kept))
            room -= len(kept)
    return chosen


def write_gauge(path: Path, answers: Sequence[Continuation], base: Sequence[Tensor]) -> None:
    """Keep the answers of the base and its log-probabilities in a file of safetensors."""
    tensors: dict[str, Tensor] = {}
    for number, (continuation, log_q) in enumerate(zip(answers, base, strict=True)):
        tensors[f"prompt.{number}"] = torch.tensor(continuation.prompt)
        tensors[f"said.{number}"] = torch.tensor(continuation.said)
        tensors[f"base.{number}"] = log_q.cpu().contiguous()
    make_folder(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def read_gauge(path: Path) -> Gauge:
    """What `write_gauge` has written; distributions are read when they are needed."""
    file = safe_open(path, framework="pt")
    count = sum(name.startswith("said.") for name in file.keys())  # noqa: SIM118 - no dictionary
    answers = [
        Continuation(
            file.get_tensor(f"prompt.{number}").tolist(), file.get_tensor(f"said.{number}").tolist()
        )
        for number in range(count)
    ]
    return Gauge(answers, lambda number: file.get_tensor(f"base.{number}"))
