"""A row as a conversation: the messages a template reads, which of them are targets, and what they
may not spell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

from sftx.data.sources.validate import product
from sftx.types import Json, Message, Row, RowError

ReasoningName = Literal["reasoning_content", "thinking", "reasoning"]
REASONING: tuple[ReasoningName, ...] = ("reasoning_content", "thinking", "reasoning")
"""The names a turn's thought goes by."""
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that Unicode reserves for uses like this one."""


class ChatMessage(Message, total=False):
    """A message as a template reads it; it may have other fields, which only the template knows."""

    thinking: str
    reasoning: str


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

    messages: list[ChatMessage]
    weights: list[float]
    tools: list[dict[str, Json]] | None = None
    kwargs: dict[str, Json] = field(default_factory=dict[str, Json])
    renderings: dict[tuple[object, ...], str] = field(
        default_factory=dict[tuple[object, ...], str], compare=False
    )  # those made so far
    shares: list[Share] = field(default_factory=list[Share])
    trained: list[int] = field(init=False)  # the turns that carry weight

    def __post_init__(self) -> None:
        self.trained = [t for t, weight in enumerate(self.weights) if weight]

    def with_messages(self, messages: list[ChatMessage]) -> Conversation:
        """The same row with other messages, none of them a target."""
        return Conversation(messages, [], self.tools, self.kwargs)


def conversation_of(
    row: Row, train_on: str | Sequence[str], given: Mapping[str, float] | None = None
) -> Conversation:
    """The conversation of a row of messages or phrases. Phrases are user turns (weight 0) and
    assistant turns.

    A turn is trained if its `train` says so, else if `train_on` chooses it; its weight then is
    `weight`, or 1, times that of the row. `given` is `data.weights`.
    """
    messages = list(row.messages) or _messages_of_phrases(row)
    chosen = _chosen(messages, train_on)
    own = [product(float(message.get("weight", 1.0)), row.weight) for message in messages]
    weights: list[float] = []
    for t, message in enumerate(messages):
        is_trained = message.get("train", t in chosen)
        weights.append(own[t] if is_trained else 0.0)
    conversation = Conversation(
        messages=[as_read(message) for message in messages],
        weights=weights,
        tools=[dict(tool) for tool in row.tools] or None,
        kwargs=dict(row.template_kwargs),
    )
    if given:
        prompts = _prompts(row, messages)
        for t, message in enumerate(messages):
            share = _share(message, own[t], bool(weights[t]), t in prompts, given)
            conversation.shares.append(share)
    return conversation


def _messages_of_phrases(row: Row) -> list[Message]:
    messages: list[Message] = []
    for phrase in row.phrases:
        role = "assistant" if phrase.weight else "user"
        weight = phrase.weight or 1.0
        messages.append({"role": role, "content": phrase.text, "weight": weight})
    return messages


def _chosen(messages: Sequence[Message], train_on: str | Sequence[str]) -> set[int]:
    """The messages that the setting `train_on` chooses."""
    roles = ["assistant"] if isinstance(train_on, str) else train_on
    found = [t for t, message in enumerate(messages) if message["role"] in roles]
    return set(found[-1:] if train_on == "last" else found)


def _prompts(row: Row, messages: Sequence[Message]) -> Set[int]:
    """The messages that are the prompt of a pair, of phrases, or of an Alpaca row."""
    if row.kind != "phrases":
        return row.prompts
    return {t for t, message in enumerate(messages) if message["role"] == "user"}


def _share(
    message: Message, own: float, is_output: bool, is_prompt: bool, given: Mapping[str, float]
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


def as_read(message: Mapping[str, object]) -> ChatMessage:
    """A message as a template reads it: without our own fields, reasoning under each of its usual
    names.
    """
    plain: dict[str, object] = {}
    for key, value in message.items():
        if key not in ("weight", "train") and value is not None:
            plain[key] = value
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return cast("ChatMessage", plain)


def reasoning_of(message: ChatMessage) -> str:
    """The thought in a message's own field; "" if it has none."""
    thoughts = (message.get(name) for name in REASONING)
    return next(filter(None, thoughts), "")


def spells(
    conversation: Conversation, control: re.Pattern[str], control_as_json: re.Pattern[str]
) -> bool:
    """Whether the row's own text spells a special token; the patterns match these as they are, and
    inside JSON.
    """
    messages = conversation.messages
    rest = [conversation.tools, conversation.kwargs]
    is_plain = not any(rest) and all(len(message) == 2 for message in messages)
    if is_plain:  # role and content, as in most rows
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

    def with_mark(match: re.Match[str]) -> str:
        token = match.group()
        return token[0] + mark + token[1:]

    def broken(value: Json) -> Json:
        if isinstance(value, str):
            return control.sub(with_mark, value)
        if isinstance(value, dict):
            return {cast("str", broken(key)): broken(item) for key, item in value.items()}
        if isinstance(value, list):
            return [broken(item) for item in value]
        return value

    messages, tools, kwargs = (broken(cast("Json", value)) for value in everything)
    made = Conversation(
        messages=cast("list[ChatMessage]", messages),
        weights=conversation.weights,
        tools=cast("list[dict[str, Json]] | None", tools),
        kwargs=cast("dict[str, Json]", kwargs),
        shares=conversation.shares,
    )
    return made, mark
