"""All settings as documents: the page of the documentation, and JSON schema for editors."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from pydantic.fields import FieldInfo

from sftx.settings.describe import allowed, doc, fields, section_of, shown
from sftx.settings.schema import SHORT_FORMS, Config


def in_words(field: FieldInfo) -> str:
    """What a setting allows, and `required` or its default as YAML would show it."""
    if field.is_required():
        return f"{allowed(field)}; required"
    return f"{allowed(field)}; default {shown(field.default)}"


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
