"""Messages of a conversation, checked and brought to the one shape that chat templates read."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, cast

from sftx.data.sources import foreign
from sftx.data.sources.validate import (
    check_spelling,
    checked_text,
    checked_weight,
    from_json,
    kind_name,
)
from sftx.types import Message, RowError

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_FIELDS = 1000
"""Fields of a message; comparing the names of more would take minutes."""
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(
        ("gpt", "assistant", "chatgpt", "model", "bot", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "developer": "developer",
}
_KNOWN = Message.__annotations__.keys() | {"thinking", "reasoning"}


def parse_messages(value: Any, field: str) -> tuple[Message, ...]:
    """The messages in field `field` of a row.

    Contents become text, tool calls the nested shape with their arguments as objects, null fields
    absent. Fields this library does not know stay: a template may read them.

    Raises:
        RowError: a message lacks role or content, or a field of it is wrong.
    """
    if not isinstance(value, list) or not value:
        raise RowError(
            f"field {field!r} must be a list of messages that is not empty, not {kind_name(value)}"
        )
    return tuple(_message(item, f"{field}[{i}]") for i, item in enumerate(value))


def other_fields(messages: Sequence[Message]) -> set[str]:
    """The fields of messages that only the template may know."""
    return {
        str(field) for message in messages if len(message) > 2 for field in message.keys() - _KNOWN
    }


def _message(raw: Any, at: str) -> Message:
    if not isinstance(raw, dict) or "role" not in raw:
        raise RowError(f"{at} must be an object with role and content")
    if len(raw) > MOST_FIELDS:
        raise RowError(
            f"{at} has {len(raw):,} fields, at most {MOST_FIELDS:,} are read; leave the others out"
        )
    role, content = raw["role"], raw.get("content")
    if len(raw) == 2 and role in ROLES and isinstance(content, str) and content.isascii():
        return cast(Message, raw)  # nothing can be wrong with most messages
    if role not in ROLES:
        meant = SHAREGPT_ROLES.get(str(role)) or "".join(
            difflib.get_close_matches(str(role), ROLES, 1)
        )
        hint = f"did you mean {meant!r}?" if meant else f"known: {', '.join(ROLES)}"
        raise RowError(f"{at}.role is {role!r}; {hint}")
    message = {key: value for key, value in raw.items() if value is not None}
    foreign.own_marks(message, at)
    _check_names(message, at)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], at)
        message.setdefault("content", "")
    if "content" not in message:
        raise RowError(
            f"{at}.content is missing" if "content" not in raw else f"{at}.content is null"
        )
    if isinstance(message["content"], list):
        message["content"] = "".join(
            _part(part, f"{at}.content[{i}]") for i, part in enumerate(message["content"])
        )
    for key in ("content", "reasoning_content", "tool_call_id", "name"):
        if key in message:
            checked_text(message[key], f"{at}.{key}")
    if "weight" in message:
        checked_weight(message["weight"], f"{at}.weight")
    if not isinstance(message.get("train", True), bool):
        raise RowError(f"{at}.train must be true or false, not {message['train']!r}")
    if message.keys() - Message.__annotations__.keys() or "tool_calls" in message:
        check_spelling(message, at)
    return cast(Message, message)


def _check_names(message: dict[str, Any], at: str) -> None:
    for key in (
        message.keys() - Message.__annotations__.keys()
    ):  # others are left to the template, if it reads them
        if close := difflib.get_close_matches(str(key), list(Message.__annotations__), 1, 0.8):
            raise RowError(f"{at} has an unknown field {key!r}; did you mean {close[0]!r}?")
        if key == "function_call":
            raise RowError(f"{at}.function_call is not read: write it as tool_calls")


def _part(part: Any, at: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and "text" in part:
        foreign.check_part(part, at)
        return checked_text(part["text"], f"{at}.text")
    kind = part.get("type") if isinstance(part, dict) else kind_name(part)
    raise RowError(f"{at} is a part of type {kind!r}; only parts of type 'text' can be trained on")


def _tool_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{at}.tool_calls must be a list of calls")
    result = []
    for i, call in enumerate(calls):
        function = call.get("function", {k: call[k] for k in ("name", "arguments") if k in call})
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{at}.tool_calls[{i}] must hold function: {{name, arguments}}")
        arguments = function.get("arguments", {})
        if isinstance(
            arguments, str
        ):  # servers hand the template an object, whatever the client sent
            arguments = (
                from_json(arguments, f"{at}.tool_calls[{i}].function.arguments")
                if arguments.strip()
                else {}
            )
        outer = {key: value for key, value in call.items() if key not in ("name", "arguments")}
        result.append(
            {"type": "function", **outer, "function": {**function, "arguments": arguments}}
        )
    return result
