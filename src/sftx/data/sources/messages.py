"""Messages of a conversation, checked and brought to the one shape that chat templates read."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cached_property
from typing import cast

from sftx.data.sources import foreign
from sftx.data.sources.arguments import INVENTED, parameters
from sftx.data.sources.validate import (
    check_spelling,
    checked_list,
    checked_text,
    checked_weight,
    from_json,
    kind_name,
)
from sftx.types import Json, Message, RowError

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_FIELDS = 1000
"""Fields of a message; comparing the names of more would take minutes."""
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "system": "system",
    "developer": "developer",
}
_FIELDS = frozenset(Message.__annotations__)
_KNOWN = _FIELDS | {"thinking", "reasoning"}


def other_fields(messages: Sequence[Message]) -> set[str]:
    """The fields of messages that only the template may know."""
    found: set[str] = set()
    for message in messages:
        if len(message) > 2:
            found.update(str(field) for field in message.keys() - _KNOWN)
    return found


class MessageReader:
    """Reads the messages of one row, whose `tools` are known.

    Contents become text, tool calls get the nested shape with objects as arguments, null fields are
    left out. Fields that this library does not know stay: a template may read them.

    Tables give every call the arguments of all calls. So a null argument that the tool does not
    have is left out, and `notes` says so. Arguments that are JSON text do not come from a table,
    and stay as they are.
    """

    def __init__(self, tools: Sequence[dict[str, Json]]) -> None:
        self._tools = tools
        self.notes: tuple[str, ...] = ()

    @cached_property
    def _parameters(self) -> dict[str, set[str]]:
        return parameters(self._tools)

    def read(self, value: Json, field: str) -> list[Message]:
        """The messages in field `field` of the row.

        Raises:
            RowError: a message lacks role or content, or a field of it is wrong.
        """
        given = checked_list(value, field, "messages that is not empty")
        return [self._message(item, f"{field}[{i}]") for i, item in enumerate(given)]

    def _message(self, raw: Json, at: str) -> Message:
        if not isinstance(raw, dict) or "role" not in raw:
            raise RowError(f"{at} must be an object with role and content")
        if len(raw) > MOST_FIELDS:
            raise RowError(
                f"{at} has {len(raw):,} fields, at most {MOST_FIELDS:,} are read; leave the others "
                "out"
            )
        if _is_plain(raw):
            return cast(Message, raw)
        _check_role(raw["role"], at)
        message: dict[str, Json] = {k: value for k, value in raw.items() if value is not None}
        foreign.own_marks(message, at)
        _check_names(message, at)
        if "tool_calls" in message:
            message["tool_calls"] = self._calls(message["tool_calls"], f"{at}.tool_calls")
            message.setdefault("content", "")
        if "content" not in message:
            found = "null" if "content" in raw else "missing"
            raise RowError(f"{at}.content is {found}")
        message["content"] = _joined(message["content"], f"{at}.content")
        _check_values(message, at)
        return cast(Message, message)

    def _calls(self, calls: Json, at: str) -> list[Json]:
        if not isinstance(calls, list):
            raise RowError(f"{at} must be a list of calls")
        return [self._call(call, at, i) for i, call in enumerate(calls)]

    def _call(self, call: Json, calls_at: str, number: int) -> Json:
        if not isinstance(call, dict):
            raise RowError(f"{calls_at} must be a list of calls")
        at = f"{calls_at}[{number}]"
        outer = dict(call)
        flat: dict[str, Json] = {}
        for key in ("name", "arguments"):
            if key in outer:
                flat[key] = outer.pop(key)
        function = call.get("function", flat)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{at} must hold function: {{name, arguments}}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            # Servers hand the template an object, whatever the client sent.
            text = arguments
            arguments = {}
            if text.strip():
                arguments = from_json(text, f"{at}.function.arguments")
        elif isinstance(arguments, dict):
            arguments = self._without_invented(arguments, function["name"])
        return {"type": "function", **outer, "function": {**function, "arguments": arguments}}

    def _without_invented(self, arguments: dict[str, Json], tool: Json) -> dict[str, Json]:
        own = self._parameters.get(str(tool))
        if own is None:
            return arguments
        kept: dict[str, Json] = {}
        for key, value in arguments.items():
            if value is not None or key in own:
                kept[key] = value
            else:
                self.notes = (INVENTED,)
        return kept


def _is_plain(raw: dict[str, Json]) -> bool:
    """Whether a message is as most are, role and content: nothing can be wrong with it."""
    content = raw.get("content")
    if len(raw) != 2 or raw["role"] not in ROLES:
        return False
    return isinstance(content, str) and content.isascii()


def _joined(content: Json, at: str) -> Json:
    """A content of parts as one text."""
    if not isinstance(content, list):
        return content
    return "".join([_part(part, f"{at}[{i}]") for i, part in enumerate(content)])


def _check_role(role: Json, at: str) -> None:
    if role in ROLES:
        return
    close = difflib.get_close_matches(str(role), ROLES, 1)
    meant = SHAREGPT_ROLES.get(str(role), "".join(close))
    hint = f"did you mean {meant!r}?" if meant else f"known: {', '.join(ROLES)}"
    raise RowError(f"{at}.role is {role!r}; {hint}")


def _check_names(message: dict[str, Json], at: str) -> None:
    """`RowError` for a name that is almost one of ours; others are left to the template."""
    for key in message.keys() - _FIELDS:
        if close := difflib.get_close_matches(str(key), sorted(_FIELDS), 1, 0.8):
            raise RowError(f"{at} has an unknown field {key!r}; did you mean {close[0]!r}?")
        if key == "function_call":
            raise RowError(f"{at}.function_call is not read: write it as tool_calls")


def _check_values(message: dict[str, Json], at: str) -> None:
    for key in ("content", "reasoning_content", "tool_call_id", "name"):
        if key in message:
            checked_text(message[key], f"{at}.{key}")
    if "weight" in message:
        checked_weight(message["weight"], f"{at}.weight")
    if not isinstance(message.get("train", True), bool):
        raise RowError(f"{at}.train must be true or false, not {message['train']!r}")
    if "tool_calls" in message or not message.keys() <= _FIELDS:
        check_spelling(message, at)


def _part(part: Json, at: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and "text" in part:
        foreign.check_part(part, at)
        return checked_text(part["text"], f"{at}.text")
    kind = part.get("type") if isinstance(part, dict) else kind_name(part)
    raise RowError(f"{at} is a part of type {kind!r}; only parts of type 'text' can be trained on")
