"""The schema as data: each setting with its dotted key, what it allows, its default and its text.

Help, documentation, the JSON schema for editors and the "did you mean" of error messages are all
made from here, and `Config` is the only list of settings they read.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from sftx.settings.schema import SHORT_FORMS, Config, Section

FOREIGN_NAMES: dict[str, tuple[str, str]] = {
    name: (entry.get("ours", ""), entry.get("note", ""))
    for entry in yaml.safe_load((files("sftx") / "foreign_names.yaml").read_text(encoding="utf-8"))
    for name in entry["names"]
}
"""The names other tools use: our dotted key, and a sentence where the meaning differs."""


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section class of a field that is a section, else None."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


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
        return "settings (" + ", ".join(inner.model_fields) + ")"
    words, null, _ = _type_in_words(field.annotation).partition(", or null")
    return words + _limits(field.metadata) + null


def _limits(metadata: Sequence[object]) -> str:
    signs: dict[type, str] = {Ge: ">= {0.ge}", Gt: "> {0.gt}", Le: "<= {0.le}", Lt: "< {0.lt}"}
    limits = [signs[type(limit)].format(limit) for limit in metadata if type(limit) in signs]
    return " " + " and ".join(limits) if limits else ""


def _type_in_words(annotation: Any) -> str:
    simple = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        Any: "anything",
    }
    if annotation in simple:
        return simple[annotation]
    arguments = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Annotated:
            return _type_in_words(arguments[0]) + _limits(arguments[1:])
        case origin if origin is Literal:
            return "one of " + ", ".join(str(value) for value in arguments)
        case origin if origin in (Union, types.UnionType):
            words = " or ".join(
                _type_in_words(part) for part in arguments if part is not type(None)
            )
            return words + ", or null" if type(None) in arguments else words
        case origin if origin is list:
            item = "rows" if arguments[0] is Any else _type_in_words(arguments[0])
            return "a list of " + item.removeprefix("one of ").replace(" or ", " / ")
        case origin if origin is dict:
            return "{name: " + _type_in_words(arguments[1]).replace(", or null", " or null") + "}"
        case origin if origin is tuple:
            return f"a list of {len(arguments)} numbers"
        case _:
            return "{" + ", ".join(annotation.model_fields) + "}"


def suggestion(key: str, section: type[Section] = Config, prefix: str = "") -> str:
    """What to write instead of the unknown `key` in `section`, whose dotted name is `prefix`."""
    name = key.strip("-").replace("-", "_").rpartition(".")[2]
    known = settings()
    same_name = [dotted for dotted in known if dotted.rpartition(".")[2] == name]
    if same_name:
        return "it is " + " or ".join(f"`{dotted}`" for dotted in same_name)
    if name.lower() in FOREIGN_NAMES:
        ours, meaning = FOREIGN_NAMES[name.lower()]
        return (
            (f"here it is `{ours}`" if ours else "")
            + (", which " if ours and meaning else "")
            + meaning
        )
    if close := get_close_matches(name, section.model_fields, 1, 0.75):
        return f"did you mean `{prefix}{close[0]}`?"
    leaves = {dotted.rpartition(".")[2]: dotted for dotted in reversed(known)} | {
        name: name for name in SHORT_FORMS
    }
    if close := get_close_matches(name, [*leaves, *FOREIGN_NAMES], 1, 0.7):
        ours = leaves[close[0]] if close[0] in leaves else FOREIGN_NAMES[close[0]][0]
        return f"did you mean `{ours}`?" if ours else FOREIGN_NAMES[close[0]][1]
    return f"known here: {', '.join(section.model_fields)}"


def shown(value: object) -> str:
    """A value as YAML would show it, for help and messages; long ones are cut."""
    if value is None or isinstance(value, bool):
        text = json.dumps(value)
    elif isinstance(value, list | tuple):
        items = cast("Sequence[object]", value)
        more = ", ..." if len(items) > 8 else ""
        text = "[" + ", ".join(map(shown, items[:8])) + more + "]"
    elif isinstance(value, dict):
        pairs = list(cast("dict[object, object]", value).items())[:8]
        text = "{" + ", ".join(f"{name}: {shown(item)}" for name, item in pairs) + "}"
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def in_words(field: FieldInfo) -> str:
    """What a setting allows, and `required` or its default as YAML would show it."""
    return f"{allowed(field)}; " + (
        "required" if field.is_required() else f"default {shown(field.default)}"
    )


def as_markdown() -> str:
    """The page `docs/settings.md`."""
    text = (files("sftx") / "settings_head.txt").read_text(encoding="utf-8")
    for key, field in fields():
        section = section_of(field)
        text += "" if "." in key else f"\n## {key}\n\n"
        text += (
            f"{doc(field)}\n\n" if section else f"* **`{key}`** ({in_words(field)}): {doc(field)}\n"
        )
    return text


def as_json_schema() -> dict[str, Any]:
    """JSON schema for editors, short forms included."""
    schema = Config.model_json_schema()
    for section, main in SHORT_FORMS.items():
        full = schema["properties"][section]
        short = schema["$defs"][section.capitalize()]["properties"][main]
        schema["properties"][section] = {
            "anyOf": [{"type": "string"}, full],
            "description": short["description"],
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "sftx run",
    }
