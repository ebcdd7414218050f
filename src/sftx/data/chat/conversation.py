"""A row as a conversation: the messages a template reads, which of them are targets, and what they
may not spell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from sftx.data.sources.validate import product
from sftx.types import Json, Row, RowError

REASONING = ("reasoning_content", "thinking", "reasoning")  # the names a turn's thought goes by
_MARKS = [
    chr(code) for code in range(0xFDD0, 0xFDF0)
]  # characters that Unicode reserves for uses like this one


class Share(NamedTuple):
    """What the parts of a message count by `data.weights`: its content in a prompt, or, where it is
    an output, the answer and the thought. `kind` is that of content or answer.
    """

    kind: str
    content: float = 0.0
    answer: float = 0.0
    thought: float = 0.0


@dataclass(slots=True)
class Conversation:
    """What one row asks a template to render: messages as a template reads them, and the weight of
    each as a target, apart from what `data.weights` says (`shares`, empty where it says nothing).
    """

    messages: list[dict[str, Any]]
    weights: list[float]
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Json] = field(default_factory=dict[str, Json])
    renderings: dict[tuple[Any, ...], str] = field(
        default_factory=dict[tuple[Any, ...], str], compare=False
    )  # those made so far
    shares: list[Share] = field(default_factory=list[Share])
    trained: list[int] = field(init=False)  # the turns that carry weight

    def __post_init__(self) -> None:
        self.trained = [t for t, weight in enumerate(self.weights) if weight]


def conversation_of(
    row: Row, train_on: str | Sequence[str], given: Mapping[str, float] | None = None
) -> Conversation:
    """The conversation of a row of messages or phrases. Phrases are user turns (weight 0) and
    assistant turns.

    A turn is trained if its `train` says so, else if `train_on` chooses it; its weight then is
    `weight`, or 1, times that of the row. `given` is `data.weights`.
    """
    raw: Sequence[Any] = row.messages or [
        {
            "role": "assistant" if phrase.weight else "user",
            "content": phrase.text,
            "weight": phrase.weight or 1.0,
        }
        for phrase in row.phrases
    ]
    roles = train_on if isinstance(train_on, list) else ["assistant"]
    chosen = [t for t, message in enumerate(raw) if message["role"] in roles]
    chosen = {*(chosen[-1:] if train_on == "last" else chosen)}
    own = [product(float(message.get("weight", 1.0)), row.weight) for message in raw]
    weights = [
        own[t] if message.get("train", t in chosen) else 0.0 for t, message in enumerate(raw)
    ]
    tools = [dict(tool) for tool in row.tools] or None
    conversation = Conversation(
        [as_read(message) for message in raw], weights, tools, dict(row.template_kwargs)
    )
    if given:
        prompts = row.prompts
        if row.kind == "phrases":
            prompts = {t for t, message in enumerate(raw) if message["role"] == "user"}
        for t, message in enumerate(raw):
            share = _share(message, own[t], bool(weights[t]), t in prompts, given)
            conversation.shares.append(share)
    return conversation


def _share(
    message: Any, own: float, is_output: bool, is_prompt: bool, given: Mapping[str, float]
) -> Share:
    """What a message counts whose own weight is `own`."""
    role = message["role"]
    if is_output:
        answer = product(own, given.get(role, 1.0))
        if role != "assistant":
            return Share(role, answer=answer)
        thought = product(own, given["reasoning"]) if "reasoning" in given else answer
        return Share("output", answer=answer, thought=thought)
    if is_prompt and "prompt" in given:
        return Share("prompt", product(own, given["prompt"]))
    if role == "assistant":
        return Share("context")
    is_left_out = message.get("train") is False and not is_prompt
    return Share(role, 0.0 if is_left_out else product(own, given.get(role, 0.0)))


def as_read(message: Any) -> dict[str, Any]:
    """A message as a template reads it: without our own fields, reasoning under each of its usual
    names.
    """
    plain = {
        key: value
        for key, value in message.items()
        if key not in ("weight", "train") and value is not None
    }
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    return (
        plain
        if reasoning is None
        else {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    )


def spells(
    conversation: Conversation, control: re.Pattern[str], control_as_json: re.Pattern[str]
) -> bool:
    """Whether the row's own text spells a special token; the patterns match these as they are, and
    inside JSON.
    """
    messages, rest = conversation.messages, [conversation.tools, conversation.kwargs]
    if not any(rest) and all(
        len(message) == 2 for message in messages
    ):  # role and content, as in most rows
        return control.search("\0".join([message["content"] for message in messages])) is not None
    return control_as_json.search(json.dumps([messages, *rest], ensure_ascii=False)) is not None


def marked(conversation: Conversation, control: re.Pattern[str]) -> tuple[Conversation, str]:
    """The conversation with a reserved character inside each special token that its own text
    spells, and the character.

    The special tokens of the rendered text are then those of the template alone.
    """
    everything = [conversation.messages, conversation.tools, conversation.kwargs]
    text = json.dumps(everything, ensure_ascii=False)
    mark = next((mark for mark in _MARKS if mark not in text), None)
    if mark is None:
        raise RowError(
            "the text spells special tokens, and holds every character that could keep them apart"
        )

    def broken(value: Any) -> Any:
        if isinstance(value, str):
            return control.sub(lambda match: match.group()[0] + mark + match.group()[1:], value)
        if isinstance(value, dict):
            items = cast("dict[str, Any]", value).items()
            return {broken(key): broken(item) for key, item in items}
        if isinstance(value, list):
            return [broken(item) for item in cast("list[Any]", value)]
        return value

    messages, tools, kwargs = (broken(value) for value in everything)
    made = Conversation(messages, conversation.weights, tools, kwargs, shares=conversation.shares)
    return made, mark
