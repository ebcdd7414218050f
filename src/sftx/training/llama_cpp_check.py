"""Whether llama.cpp computes from a GGUF file what was trained: logits, answers, stop tokens, chats.

llama.cpp rounds what enters a matrix as the matrix itself is stored (to 8 bits where that is Q8_0),
and reads the curve of GELU from a table in half precision. So its logits are never those of torch to
the last digits; `WITHIN` is how far they may be.
"""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sftx.training.llama_cpp import LlamaCpp
from sftx.training.merging import apart
from sftx.training.parity import LOOKED_AT, NEW_TOKENS, Question, longest_question
from sftx.types import UserError

WITHIN = {"F32": 2e-3, "F16": 1e-2, "BF16": 4e-2}
"""How far a logit may be from ours, relative to the largest; a mistake moves it by more."""
WITHIN_QUANTISED = 1e-1


@dataclass(frozen=True, slots=True)
class ByLlamaCpp:
    """What llama.cpp makes of an exported file.

    `moved`: how far a logit is from ours at most, relative to the largest. `same_answers`
    of `answers` greedy ones. `same_chats` of `chats`: requests of which its server, with its own
    reading of the chat template, makes the token ids of training.
    """

    moved: float
    same_answers: int
    answers: int
    same_chats: int
    chats: int

    def line(self) -> str:
        """The whole in one line."""
        chats = f", {self.same_chats} of {self.chats} chats served as trained" if self.chats else ""
        return (
            f"logits within {self.moved:.1e} of the largest, {self.same_answers} of {self.answers} "
            f"greedy answers equal, stops where the model does{chats}"
        )


def check_llama_cpp(
    llama_cpp: LlamaCpp,
    kind: str,
    model: PreTrainedModel,
    questions: Sequence[Question],
    stops: Sequence[int],
) -> ByLlamaCpp:
    """Compare with `model`, which holds the weights of the file.

    Raises:
        UserError: llama.cpp does not stop at one of `stops`, or gives other logits or answers than
            the rounding of the type explains.
    """
    for stop in stops:
        if not llama_cpp.stops_at(stop):
            raise UserError(
                f"sftx export: llama.cpp does not stop at token {stop}, at which the trained model "
                "does; nothing was written"
            )
    within = WITHIN.get(kind, WITHIN_QUANTISED)
    longest = longest_question(model)
    looked_at = [question.ids[-longest:] for question in questions[:LOOKED_AT]]
    moved = 0.0
    same = 0
    for ids in looked_at:
        moved = max(moved, _moved(llama_cpp, model, ids, within))
        said = llama_cpp.answer(ids, NEW_TOKENS)
        same += _is_same_answer(model, ids, said, stops, within)
    served = [llama_cpp.served(question) for question in questions if question.messages]
    trained = [question.ids for question in questions if question.messages]
    known = [
        (ids, theirs) for ids, theirs in zip(trained, served, strict=True) if theirs is not None
    ]
    same_chats = sum(ids == theirs for ids, theirs in known)
    return ByLlamaCpp(moved, same, len(looked_at), same_chats, len(known))


def _next_token(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The logits after `ids`, float32[V], centred: llama.cpp tells them up to a constant."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
    return _centred(logits[0, -1].float())


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean()


def _moved(llama_cpp: LlamaCpp, model: PreTrainedModel, ids: Sequence[int], within: float) -> float:
    """How far llama.cpp's next token is from ours, after half of the question and after the whole."""
    moved = 0.0
    for part in (ids[: (len(ids) + 1) // 2], ids):
        moved = max(moved, apart(_next_token(model, part), _centred(llama_cpp.next_token(part))))
    if not moved <= within:
        raise UserError(
            f"sftx export: llama.cpp gives other logits than the trained weights ({moved:.1e} of the "
            f"largest; the rounding of the type explains {within:.0e}); nothing was written"
        )
    return moved


def _is_same_answer(
    model: PreTrainedModel,
    ids: Sequence[int],
    said: Sequence[int],
    stops: Sequence[int],
    within: float,
) -> bool:
    """Whether `said` is the greedy answer; UserError where a token was taken that is not as good as
    the best, within the rounding.
    """
    with torch.no_grad():
        whole = torch.tensor([[*ids, *said]])
        logits = model(input_ids=whole, use_cache=False).logits[0, len(ids) - 1 :].float()
    taken = [[token] for token in said]
    if len(said) < NEW_TOKENS:
        taken.append(list(stops))
    is_same = True
    for token, scores in zip(taken, logits, strict=False):
        best = int(scores.argmax())
        is_same &= best in token
        lost = float(scores[best] - scores[token].max())
        if lost > 2 * within * float(_centred(scores).abs().max()):
            raise UserError(
                f"sftx export: llama.cpp answers with token {token[0]} where the trained model says "
                f"{best}; nothing was written"
            )
    return is_same
