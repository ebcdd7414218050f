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
    )
    """Those made so far."""
    shares: list[Share] = field(default_factory=list[Share])
    trained: list[int] = field(init=False)
    """The turns that carry weight."""

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
    own: list[float] = []
    weights: list[float] = []
    for t, message in enumerate(messages):
        weight = product(float(message.get("weight", 1.0)), row.weight)
        own.append(weight)
        is_trained = message.get("train", t in chosen)
        weights.append(weight if is_trained else 0.0)
    conversation = Conversation(
        messages=[as_read(message) for message in messages],
        weights=weights,
        tools=[dict(tool) for tool in row.tools] or None,
        kwargs=dict(row.template_kwargs),
    )
    if given:
        prompts = _prompts(row, messages)
        for t, message in enumerate(messages):
            if weights[t]:
                share = _share_of_output(message, own[t], given)
            else:
                share = _share_of_prompt(message, own[t], t in prompts, given)
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


def _share_of_output(message: Message, own: float, given: Mapping[str, float]) -> Share:
    """What a trained message counts whose own weight is `own`."""
    role = message["role"]
    answer = product(own, given.get(role, 1.0))
    if role != "assistant":
        return Share(role, answer=answer)
    thought = answer
    if "reasoning" in given:
        thought = product(own, given["reasoning"])
    return Share("output", answer=answer, thought=thought)


def _share_of_prompt(
    message: Message, own: float, is_prompt: bool, given: Mapping[str, float]
) -> Share:
    """What another message counts; `is_prompt`: it is the prompt of a row that has only one."""
    role = message["role"]
    if is_prompt and "prompt" in given:
        return Share("prompt", product(own, given["prompt"]))
    if role == "assistant":
        return Share("context")
    if message.get("train") is False and not is_prompt:
        return Share(role)
    return Share(role, product(own, given.get(role, 0.0)))


def as_read(message: Mapping[str, object]) -> ChatMessage:
    """A message as a template reads it: without our own fields, reasoning under each of its usual
    names.
    """
    plain: dict[str, object] = {}
    for key, value in message.items():
        if key not in ("weight", "train") and value is not None:
            plain[key] = value
    for key in REASONING:
        if key in plain:
            reasoning = plain[key]
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
            break
    return cast("ChatMessage", plain)


def reasoning_of(message: ChatMessage) -> str:
    """The thought in a message's own field; "" if it has none."""
    for name in REASONING:
        if thought := message.get(name):
            return thought
    return ""


def spells(
    conversation: Conversation, control: re.Pattern[str], control_as_json: re.Pattern[str]
) -> bool:
    """Whether the row's own text spells a special token; the patterns match these as they are, and
    inside JSON.
    """
    messages = conversation.messages
    has_more = conversation.tools or conversation.kwargs
    if not has_more and all(len(message) == 2 for message in messages):
        # Role and content, as in most rows.
        text = "\0".join([message["content"] for message in messages])
        return control.search(text) is not None
    return control_as_json.search(_as_json(conversation)) is not None


def _as_json(conversation: Conversation) -> str:
    """All that a template reads of the row."""
    everything = [conversation.messages, conversation.tools, conversation.kwargs]
    return json.dumps(everything, ensure_ascii=False)


def marked(conversation: Conversation, control: re.Pattern[str]) -> tuple[Conversation, str]:
    """The conversation with a reserved character inside each special token that its own text
    spells, and the character.

    The special tokens of the rendered text are then those of the template alone.
    """
    text = _as_json(conversation)
    free = [mark for mark in _MARKS if mark not in text]
    if not free:
        raise RowError(
            "the text spells special tokens, and holds every character that could keep them apart"
        )
    mark = free[0]

    def with_mark(match: re.Match[str]) -> str:
        token = match.group()
        return token[0] + mark + token[1:]

    def broken(value: Json) -> Json:
        if isinstance(value, str):
            return control.sub(with_mark, value)
        if isinstance(value, list):
            return [broken(item) for item in value]
        if not isinstance(value, dict):
            return value
        made: dict[str, Json] = {}
        for key, item in value.items():
            made[cast("str", broken(key))] = broken(item)
        return made

    messages = broken(cast("Json", conversation.messages))
    tools = broken(cast("Json", conversation.tools))
    kwargs = broken(conversation.kwargs)
    made = Conversation(
        messages=cast("list[ChatMessage]", messages),
        weights=conversation.weights,
        tools=cast("list[dict[str, Json]] | None", tools),
        kwargs=cast("dict[str, Json]", kwargs),
        shares=conversation.shares,
    )
    return made, mark
