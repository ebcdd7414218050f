"""Whether what an export wrote is what was trained: the same token ids, logits and greedy answers.

Three models are compared: the trained one, the same with its values rounded as the file rounds them,
and the one that is read back. The last two must agree to the last digits, whatever the dtype; how far
they are from the first is what the dtype costs, and is told.
"""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from sftx.data.chat.conversation import conversation_of
from sftx.data.encoder import Encoded, Encoder
from sftx.eval.forgetting import Continuation
from sftx.eval.generate import prompt_of
from sftx.model_config import positions_in
from sftx.training.merging import apart, probe
from sftx.types import Json, Message, Row, RowError, UserError

NEW_TOKENS = 16
LOOKED_AT = 4  # questions that are answered
LONGEST = 256  # tokens of a question of which logits are compared
AGREE = 1e-4
"""How far a logit may be from what the rounded weights give, relative to the largest."""

_ASKED = (
    "Who wrote the plays of Shakespeare?",
    "What is 12,345 + 67.8? Show  your\nworking.",
    "def f(x):\n\treturn x ** 2  # what does this do?",
    "Écris «bonjour» en 日本語, שלום and Ελληνικά 🙂🏽.",
    '{"name": "Ada", "tags": ["a", "b"], "n": null}',
    "I'll say we've won; DON'T you think so?   ",
    "a",
    "   Leading spaces, <b>marks</b> & a line\r\nthat ends.",
)
_SAID = ("Yes.", "It gives\n\n1. one\n2. two", "4 × 4 = 16", "« D'accord »")


@dataclass(frozen=True, slots=True)
class Question:
    """What a server is asked: `messages` (with `tools` and `kwargs` of the template), or `text` where
    there is no template; `ids` are those that training puts before the answer.
    """

    ids: list[int]
    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Json], ...] = ()
    kwargs: dict[str, Json] | None = None


Reading = Callable[[Question], list[int]]
"""The ids that a reader of the exported files would send for a question."""


def own_rows() -> list[Row]:
    """Conversations of one and of several turns, in several scripts, with odd spaces and digits."""
    rows: list[Row] = []
    for number, asked in enumerate(_ASKED):
        said = _SAID[number % len(_SAID)]
        one: list[Message] = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": said},
        ]
        more: list[Message] = [
            {"role": "user", "content": _ASKED[number - 1]},
            {"role": "assistant", "content": "Good."},
        ]
        rows.append(Row("messages", messages=tuple(one)))
        rows.append(Row("messages", messages=(*more, *one)))
    return rows


def questions_of(rows: Sequence[Row], encoder: Encoder) -> list[Question]:
    """The question before the last answer of each row, as training writes it; plain texts as they are
    where there is no template.
    """
    if encoder.chat_template is None:
        texts = _ASKED
        return [Question(encoder.tokenizer.encode(text), text) for text in texts]
    found: list[Question] = []
    for row, encoded in zip(rows, encoder.encode(rows), strict=True):
        question = _question(row, encoded, encoder)
        if question is not None:
            found.append(question)
    if not found:
        raise UserError(
            "sftx export: none of the rows asks something; data= names rows to check with"
        )
    return found


def _question(row: Row, encoded: Encoded | RowError, encoder: Encoder) -> Question | None:
    """The question before the last trained answer of a row; None where it has none."""
    if not isinstance(encoded, Encoded) or row.kind not in ("messages", "phrases"):
        return None
    prompts = [prompt_of(each, encoder.tokenizer, encoder.stop_ids) for each in encoded.examples]
    if not prompts or prompts[-1] is None:
        return None
    conversation = conversation_of(row, encoder.data.train_on)
    texts = [str(message.get("content")) for message in conversation.messages]
    if any(encoder.tokenizer.control.search(text) for text in texts):
        return None  # a marker spelled in a row is text in training, and a marker to a server
    before = cast("list[Message]", list(conversation.messages[: conversation.trained[-1]]))
    return Question(prompts[-1].ids, "", tuple(before), row.tools, row.template_kwargs)


def rendered(tokenizer: Any, question: Question) -> str:
    """The text that a server makes of a question."""
    if not question.messages:
        return question.text
    return cast(
        str,
        tokenizer.apply_chat_template(
            [dict(message) for message in question.messages],
            tools=list(question.tools) or None,
            add_generation_prompt=True,
            tokenize=False,
            **(question.kwargs or {}),
        ),
    )


def reading_of(tokenizer: Any) -> Reading:
    """How transformers reads a folder: the template's text, cut into tokens."""

    def ids(question: Question) -> list[int]:
        text = rendered(tokenizer, question)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return ids


def check_ids(name: str, reading: Reading, questions: Sequence[Question]) -> None:
    """UserError where a reader of what was exported sends other ids than training has seen."""
    for question in questions:
        theirs = reading(question)
        if theirs == question.ids:
            continue
        pairs = zip(question.ids, theirs, strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        at = min(len(theirs), len(question.ids)) if same is None else same
        asked = question.text or str(question.messages[-1].get("content"))
        raise UserError(
            f"sftx export: {name} sends other tokens than were trained: for {asked[:60]!r} they "
            f"differ from token {at} on: {question.ids[at : at + 8]} in training, "
            f"{theirs[at : at + 8]} there; nothing was written"
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """Logits [1, T, V] of some questions and of random tokens, and the greedy answers."""

    logits: list[Tensor]
    answers: list[list[int]]


def longest_question(model: PreTrainedModel) -> int:
    """The most tokens of a question that leave room for an answer; longer ones lose their beginning."""
    positions = positions_in(model.config.get_text_config().to_dict()) or LONGEST
    return max(min(LONGEST, positions - NEW_TOKENS), 1)


def measure(
    model: PreTrainedModel, questions: Sequence[Question], stops: Sequence[int]
) -> Measured:
    """What a model says to the first `LOOKED_AT` questions."""
    longest = longest_question(model)
    logits = [probe(model)]
    answers = list[list[int]]()
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else 0,
    )
    for question in questions[:LOOKED_AT]:
        ids = torch.tensor([question.ids[-longest:]])
        with torch.no_grad():
            logits.append(model(input_ids=ids, use_cache=False).logits.float())
            said = cast(Any, model).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
            )
        answers.append(said[0, ids.shape[1] :].tolist())
    return Measured(logits, answers)


def distance(one: Measured, other: Measured) -> float:
    """How far a logit of `other` is from that of `one` at most, relative to the largest of `one`."""
    pairs = zip(one.logits, other.logits, strict=True)
    return max(apart(a, b) for a, b in pairs)


def check_model(name: str, expected: Measured, found: Measured) -> float:
    """How far the logits of `found` are from `expected`; UserError where that is more than `AGREE`,
    or an answer is another.
    """
    moved = distance(expected, found)
    if not moved <= AGREE:
        raise UserError(
            f"sftx export: {name} gives other logits than the trained weights ({moved:.1e} of the "
            "largest); nothing was written"
        )
    if expected.answers != found.answers:
        raise UserError(f"sftx export: {name} gives other answers; nothing was written")
    return moved


def continuations(questions: Sequence[Question], measured: Measured) -> list[Continuation]:
    """What was asked and answered, for the forgetting gauge."""
    pairs = zip(questions, measured.answers, strict=False)
    return [Continuation(question.ids[-LONGEST:], said) for question, said in pairs if said]
