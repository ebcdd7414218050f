"""A compiled chat template that renders messages in the shape it can read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

from sftx.data.chat.calls import has_new_escapes
from sftx.data.chat.conversation import ChatMessage, Conversation
from sftx.data.chat.limits import LimitError
from sftx.data.chat.sandbox import TEMPLATE_ERRORS, compile_template, run_template
from sftx.types import Function, Json, RowError, ToolCall, UserError

# Words of probes: no template and no row holds them.
USER, MODEL, THOUGHT, NEXT = "qzuserqz", "qzmodelqz", "qzthoughtqz", "qznextqz"
TOOL = "qztool"
TOOLS: list[dict[str, Json]] = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "qz",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    }
]
_MAX_OVER_LIMITS = 5  # rows; each took seconds
Shaped: TypeAlias = Mapping[str, object]
"""A message in the shape that a template reads."""
_NO_SWITCH: Mapping[str, Json] = {}


def says(role: str, content: str) -> ChatMessage:
    """A message of a probe."""
    return {"role": role, "content": content}


def calls(arguments: dict[str, Json], number: int = 0, tool: str = TOOL) -> ToolCall:
    """A call of a tool of the probes."""
    function: Function = {"name": tool, "arguments": arguments}
    return {"type": "function", "id": f"call{number:05}", "function": function}


def says_calls(*given: ToolCall) -> ChatMessage:
    """An answer that is these calls."""
    return {"role": "assistant", "content": "", "tool_calls": list(given)}


def result(content: str, number: int = 0, tool: str = TOOL) -> ChatMessage:
    """What the tool answers to a call."""
    return {"role": "tool", "content": content, "name": tool, "tool_call_id": f"call{number:05}"}


class Renderer:
    """Renders conversations as transformers does. `UserError` if the template does not compile.

    `special`: the named special tokens that a template may refer to (`bos_token`, ...). `name`:
    what to call the template in messages.
    """

    def __init__(self, source: str, special: dict[str, str], name: str):
        self.source = source
        self.name = name
        self._special = special
        self._over_limits = 0
        try:
            self._template = compile_template(source)
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{name}: the template does not compile: {error}") from error

    def render(self, conversation: Conversation, end: int, generate: bool, **switch: Json) -> str:
        """The text of the first `end` messages; `switch`: settings of the template. `RowError` if
        it refuses them.
        """
        key = (self, end, generate, *switch.items())
        known = conversation.renderings
        if key in known:
            return known[key]
        messages = [self._shaped(message) for message in conversation.messages[:end]]
        try:
            known[key] = self._run(
                messages, conversation.tools, generate, {**conversation.kwargs, **switch}
            )
        except TEMPLATE_ERRORS as error:
            self._over_limits += isinstance(error, LimitError)
            if self._over_limits > _MAX_OVER_LIMITS:
                raise UserError(
                    f"the {self.name} goes over its limits in {self._over_limits} rows: {error}"
                ) from error
            raise RowError(
                f"the {self.name} refuses the messages up to turn {end}: {error}"
            ) from error
        return known[key]

    def probe(
        self,
        *messages: ChatMessage,
        generate: bool = False,
        tools: list[dict[str, Json]] | None = None,
        switch: Mapping[str, Json] = _NO_SWITCH,
    ) -> str | None:
        """The text of a small conversation; None if the template refuses it."""
        if tools is None and self._needs_tools:
            tools = TOOLS
        return self._try([self._shaped(message) for message in messages], tools, generate, switch)

    def _run(
        self,
        messages: Sequence[Shaped],
        tools: list[dict[str, Json]] | None,
        generate: bool,
        switch: Mapping[str, Json],
    ) -> str:
        variables: dict[str, object] = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generate,
        }
        return run_template(self._template, {**self._special, **variables, **switch})

    def _try(
        self,
        messages: Sequence[Shaped],
        tools: list[dict[str, Json]] | None = None,
        generate: bool = False,
        switch: Mapping[str, Json] = _NO_SWITCH,
    ) -> str | None:
        """The text of messages whose shape is not changed."""
        try:
            return self._run(messages, tools, generate, switch)
        except LimitError as error:  # for the few words of a probe: it is not tried any further
            raise UserError(
                f"the {self.name} cannot be used: for two or three short messages {error}"
            ) from error
        except TEMPLATE_ERRORS:
            return None

    def _shaped(self, message: ChatMessage) -> Shaped:
        """A message in the shape that this template reads."""
        if "tool_calls" in message and self._arguments_as_text:
            message = _with_arguments_as_text(message)
        return _with_parts(message) if self._content_as_parts else message

    @cached_property
    def _needs_tools(self) -> bool:
        """Whether the template only renders conversations that come with tools."""
        return self._try([says("user", USER)], generate=True) is None

    @cached_property
    def _content_as_parts(self) -> bool:
        """Whether contents must be lists of parts: the template fails on text or leaves it out."""

        def shows(messages: Sequence[Shaped]) -> bool:
            text = self._try(messages) or ""
            return USER in text and MODEL in text

        plain = [says("user", USER), says("assistant", MODEL)]
        return not shows(plain) and shows([_with_parts(message) for message in plain])

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether tool calls must carry their arguments as JSON text, not as an object, to be
        written as JSON.

        An object is what servers hand to templates; it stays if the template writes it well.
        """
        call = says_calls(calls({"qzkey": "qzvalue"}))
        texts: list[str | None] = []
        for message in (call, _with_arguments_as_text(call)):
            asked: list[Shaped] = [says("user", USER), message]
            if self._content_as_parts:
                asked = [_with_parts(each) for each in asked]
            text = self._try(asked, TOOLS)
            texts.append(text)
            if text is not None and _writes_well(text, message):
                return message is not call
        return texts[0] is None and texts[1] is not None


def _writes_well(text: str, message: ChatMessage) -> bool:
    """Whether a template has written the arguments of the call in a probe as JSON."""
    is_written = "qzkey" in text and "qzvalue" in text
    return is_written and "'qzkey'" not in text and not has_new_escapes(text, message)


def _with_parts(message: Shaped) -> Shaped:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_arguments_as_text(message: ChatMessage) -> ChatMessage:
    written: list[ToolCall] = []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        written.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": written}


_PARTIAL_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")


def common_length(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low = 0
    high = min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def ends_in_tag(text: str) -> bool:
    """Whether a text ends inside a tag that is not complete."""
    return _PARTIAL_TAG.search(text[-100:]) is not None


def common(first: str, second: str) -> str:
    """The common beginning of two texts, never ending inside a tag."""
    shared = first[: common_length(first, second)]
    partial = _PARTIAL_TAG.search(shared[-100:])
    return shared.removesuffix(partial.group()) if partial else shared
