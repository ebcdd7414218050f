"""A compiled chat template that renders messages in the shape it can read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sftx.data.chat.calls import has_new_escapes
from sftx.data.chat.conversation import Conversation
from sftx.data.chat.limits import LimitError
from sftx.data.chat.sandbox import TEMPLATE_ERRORS, compile_template, run_template
from sftx.types import Json, RowError, UserError

# Words of probes: no template and no row holds them.
USER, MODEL, THOUGHT, NEXT = "qzuserqz", "qzmodelqz", "qzthoughtqz", "qznextqz"
TOOL: dict[str, Json] = {
    "name": "qztool",
    "description": "qz",
    "parameters": {"type": "object", "properties": {}, "required": []},
}
TOOLS: list[dict[str, Json]] = [{"type": "function", "function": TOOL}]
_MAX_OVER_LIMITS = 5  # rows; each took seconds


def says(role: str, content: Any) -> dict[str, Any]:
    """A message of a probe."""
    return {"role": role, "content": content}


def calls(arguments: Any) -> dict[str, Any]:
    """An answer that calls the tool of the probes."""
    call: dict[str, Json] = {
        "type": "function",
        "id": "call00000",
        "function": {"name": TOOL["name"], "arguments": arguments},
    }
    return {**says("assistant", ""), "tool_calls": [call]}


def result(content: str) -> dict[str, Any]:
    """What that tool answers."""
    return {**says("tool", content), "name": TOOL["name"], "tool_call_id": "call00000"}


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

    def render(self, conversation: Conversation, end: int, generate: bool, **switch: Any) -> str:
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
        self, *messages: dict[str, Any], generate: bool = False, tools: Any = None, **switch: Any
    ) -> str | None:
        """The text of a small conversation; None if the template refuses it."""
        if tools is None and self._needs_tools:
            tools = TOOLS
        return self._try([self._shaped(message) for message in messages], tools, generate, switch)

    def _run(
        self, messages: Sequence[Any], tools: Any, generate: bool, switch: dict[str, Any]
    ) -> str:
        variables = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generate,
        }
        return run_template(self._template, {**self._special, **variables, **switch})

    def _try(
        self, messages: Sequence[Any], tools: Any = None, generate: bool = False, switch: Any = None
    ) -> str | None:
        """The text of messages whose shape is not changed."""
        try:
            return self._run(messages, tools, generate, switch or {})
        except LimitError as error:  # for the few words of a probe: it is not tried any further
            raise UserError(
                f"the {self.name} cannot be used: for two or three short messages {error}"
            ) from error
        except TEMPLATE_ERRORS:
            return None

    def _shaped(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message in the shape that this template reads."""
        if self._content_as_parts:
            message = _with_parts(message)
        if "tool_calls" in message and self._arguments_as_text:
            message = _with_arguments_as_text(message)
        return message

    @cached_property
    def _needs_tools(self) -> bool:
        """Whether the template only renders conversations that come with tools."""
        return self._try([says("user", USER)], generate=True) is None

    @cached_property
    def _content_as_parts(self) -> bool:
        """Whether contents must be lists of parts: the template fails on text or leaves it out."""

        def shows(messages: list[dict[str, Any]]) -> bool:
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
        call = calls({"qzkey": "qzvalue"})
        question = says("user", USER)
        if self._content_as_parts:
            question, call = _with_parts(question), _with_parts(call)
        texts: list[str | None] = []
        for message in (call, _with_arguments_as_text(call)):
            text = self._try([question, message], TOOLS)
            texts.append(text)
            written = text is not None and "qzkey" in text and "qzvalue" in text
            spoiled = text is not None and ("'qzkey'" in text or has_new_escapes(text, message))
            if written and not spoiled:
                return message is not call
        return texts[0] is None and texts[1] is not None


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    written: list[dict[str, Any]] = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        written.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": written}


_PARTIAL_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")


def common_length(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(first), len(second))
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
