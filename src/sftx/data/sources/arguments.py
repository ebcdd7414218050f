"""The arguments of tool calls against the schemas of the tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sftx.types import Message

INVENTED = "null arguments left out that the tool does not have"


def parameters(tools: Sequence[dict[str, Any]]) -> dict[str, set[str]]:
    """The names of the arguments of each tool, by its name; a tool that takes any, or has an odd
    schema, is absent.
    """
    found: dict[str, set[str]] = {}
    for tool in tools:
        inner = tool.get("function", tool)
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            schema = inner.get("parameters")
            if not isinstance(schema, dict) or schema.get("additionalProperties"):
                continue
            names = schema.get("properties")
            if isinstance(names, dict):
                found[inner["name"]] = set(names)
    return found


def calls_of(messages: Sequence[Message]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, arguments) of every call whose arguments are an object."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if isinstance(function.get("arguments"), dict):
                yield function["name"], function["arguments"]


def without_invented(messages: Any, tools: Sequence[dict[str, Any]]) -> tuple[Any, bool]:
    """Messages as they are in a file, without null arguments that their tools do not have; whether
    there were any.

    Tables give every call the arguments of all calls: what is null and not the tool's own, nobody
    wrote. Arguments that are JSON text are no part of a table, and stay as they are.
    """
    if not isinstance(messages, list) or not any(
        isinstance(m, dict) and m.get("tool_calls") for m in messages
    ):
        return messages, False
    known = parameters(tools)
    kept = [_with_calls(message, known) for message in messages]
    return kept, any(new is not old for new, old in zip(kept, messages, strict=True))


def _with_calls(message: Any, known: dict[str, set[str]]) -> Any:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list):
        return message
    kept = [_with_arguments(call, known) for call in calls]
    changed = any(new is not old for new, old in zip(kept, calls, strict=True))
    return {**message, "tool_calls": kept} if changed else message


def _with_arguments(call: Any, known: dict[str, set[str]]) -> Any:
    if not isinstance(call, dict):
        return call
    function = call.get("function", call)
    if not isinstance(function, dict):
        return call
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or name not in known or not isinstance(arguments, dict):
        return call
    own = known[name]
    kept = {key: value for key, value in arguments.items() if value is not None or key in own}
    if len(kept) == len(arguments):
        return call
    changed = {**function, "arguments": kept}
    return {**call, "function": changed} if "function" in call else changed
