"""The schema as data: each setting with its dotted key, what it allows, its default and its text.

Help, documentation, the JSON schema for editors and the "did you mean" of error messages are all
made from here, and `Config` is the only list of settings they read.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from sftx.settings.schema import SHORT_FORMS, Config, Section


def _foreign_names() -> dict[str, tuple[str, str]]:
    text = (files("sftx") / "foreign_names.yaml").read_text(encoding="utf-8")
    names: dict[str, tuple[str, str]] = {}
    for entry in yaml.safe_load(text):
        meaning = (entry.get("ours", ""), entry.get("note", ""))
        for name in entry["names"]:
            names[name] = meaning
    return names


FOREIGN_NAMES = _foreign_names()
"""The names other tools use: our dotted key, and a sentence where the meaning differs."""


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section class of a field that is a section, else None."""
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return None


def fields(prefix: str = "", section: type[Section] = Config) -> Iterator[tuple[str, FieldInfo]]:
    """Every field with its dotted key, sections before their settings."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if inner := section_of(field):
            yield from fields(f"{prefix}{name}.", inner)


@cache
def settings() -> dict[str, FieldInfo]:
    """Every setting (sections left out) by its dotted key, in the order of the schema."""
    return {key: field for key, field in fields() if section_of(field) is None}


def doc(field: FieldInfo) -> str:
    """The documentation of a field, on one line."""
    return " ".join((field.description or "").split())


def allowed(field: FieldInfo) -> str:
    """What a field allows, in words: `a whole number >= 1, or null`."""
    if inner := section_of(field):
        names = ", ".join(inner.model_fields)
        return f"settings ({names})"
    words, null, _ = _type_in_words(field.annotation).partition(", or null")
    return words + _limits(field.metadata) + null


_SIGNS: dict[type, str] = {
    Ge: ">= {0.ge}",
    Gt: "> {0.gt}",
    Le: "<= {0.le}",
    Lt: "< {0.lt}",
}


def _limits(metadata: Sequence[object]) -> str:
    """The limits of a number in words, after a space; "" if it has none."""
    limits: list[str] = []
    for limit in metadata:
        sign = _SIGNS.get(type(limit))
        if sign is not None:
            limits.append(sign.format(limit))
    if not limits:
        return ""
    return " " + " and ".join(limits)


_SIMPLE: dict[object, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Any: "anything",
}


def _type_in_words(annotation: Any) -> str:
    if annotation in _SIMPLE:
        return _SIMPLE[annotation]
    origin = get_origin(annotation)
    if origin in _IN_WORDS:
        return _IN_WORDS[origin](get_args(annotation))
    return "{" + ", ".join(annotation.model_fields) + "}"


def _union(parts: Sequence[object]) -> str:
    words = " or ".join(_type_in_words(part) for part in parts if part is not type(None))
    if type(None) in parts:
        words += ", or null"
    return words


def _list(items: Sequence[object]) -> str:
    if items[0] is Any:
        return "a list of rows"
    item = _type_in_words(items[0]).removeprefix("one of ")
    return "a list of " + item.replace(" or ", " / ")


def _dictionary(types: Sequence[object]) -> str:
    keys, values = types
    names = "name"
    if get_origin(keys) is Literal:
        names = " / ".join(map(str, get_args(keys)))
    words = _type_in_words(values).replace(", or null", " or null")
    return f"{{{names}: {words}}}"


_IN_WORDS: dict[object, Callable[[Sequence[object]], str]] = {
    Annotated: lambda parts: _type_in_words(parts[0]) + _limits(parts[1:]),
    Literal: lambda values: "one of " + ", ".join(map(str, values)),
    Union: _union,
    types.UnionType: _union,
    list: _list,
    dict: _dictionary,
    tuple: lambda items: f"a list of {len(items)} numbers",
    Callable: lambda _: "a function",
}
"""What each kind of type is called, from what stands in its brackets."""


def suggestion(key: str, section: type[Section] = Config, prefix: str = "") -> str:
    """What to write instead of the unknown `key` in `section`, whose dotted name is `prefix`."""
    name = _leaf(key.strip("-").replace("-", "_"))
    same_name = [f"`{dotted}`" for dotted in settings() if _leaf(dotted) == name]
    if same_name:
        return "it is " + " or ".join(same_name)
    if name.lower() in FOREIGN_NAMES:
        return _of_another_tool(name.lower())
    if close := get_close_matches(name, section.model_fields, 1, 0.75):
        return f"did you mean `{prefix}{close[0]}`?"
    return _close_elsewhere(name) or f"known here: {', '.join(section.model_fields)}"


def _leaf(dotted: str) -> str:
    """The last part of a dotted key."""
    return dotted.rpartition(".")[2]


def _of_another_tool(name: str) -> str:
    """What to write instead of a name that other tools use."""
    ours, meaning = FOREIGN_NAMES[name]
    if not ours:
        return meaning
    here = f"here it is `{ours}`"
    if meaning:
        here += f", which {meaning}"
    return here


def _close_elsewhere(name: str) -> str:
    """What to write instead of a name that is almost one of another section or tool; else ""."""
    leaves = {_leaf(dotted): dotted for dotted in reversed(settings())}
    for section in SHORT_FORMS:
        leaves[section] = section
    close = get_close_matches(name, [*leaves, *FOREIGN_NAMES], 1, 0.7)
    if not close:
        return ""
    if close[0] in leaves:
        ours = leaves[close[0]]
    else:
        ours, meaning = FOREIGN_NAMES[close[0]]
        if not ours:
            return meaning
    return f"did you mean `{ours}`?"


def shown(value: object) -> str:
    """A value as YAML would show it, for help and messages; long ones are cut."""
    if value is None or isinstance(value, bool):
        text = json.dumps(value)
    elif isinstance(value, list | tuple):
        items = cast("Sequence[object]", value)
        shown_items = [shown(item) for item in items[:8]]
        if len(items) > 8:
            shown_items.append("...")
        text = "[" + ", ".join(shown_items) + "]"
    elif isinstance(value, dict):
        pairs = list(cast("dict[object, object]", value).items())
        shown_pairs = [f"{name}: {shown(item)}" for name, item in pairs[:8]]
        text = "{" + ", ".join(shown_pairs) + "}"
    else:
        text = repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    return text
