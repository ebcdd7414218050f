"""The arguments of tool calls against the schemas of the tools."""

from __future__ import annotations

from collections.abc import Sequence

from sftx.types import Json

INVENTED = "null arguments left out that the tool does not have"


def parameters(tools: Sequence[dict[str, Json]]) -> dict[str, set[str]]:
    """The names of the arguments of each tool, by its name.

    A tool that takes any arguments, or has a schema of another kind, is absent.
    """
    found: dict[str, set[str]] = {}
    for tool in tools:
        inner = tool.get("function", tool)
        if not isinstance(inner, dict):
            continue
        name = inner.get("name")
        schema = inner.get("parameters")
        if not isinstance(schema, dict) or schema.get("additionalProperties"):
            continue
        names = schema.get("properties")
        if isinstance(name, str) and isinstance(names, dict):
            found[name] = set(names)
    return found
