"""The YAML of a first run: short, in sections, each setting with its reason behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sftx.settings.documents import as_json_schema
from sftx.settings.strict_yaml import dump
from sftx.starter.choose import Setting
from sftx.types import UserError

SCHEMA = "sftx.schema.json"
COLUMN = 36
"""Where comments begin."""
LONGEST = 200  # characters of a comment


def as_yaml(settings: Sequence[Setting], head: Sequence[str]) -> str:
    """The file: the editor's line, some lines of comment, then the settings."""
    lines = [f"# yaml-language-server: $schema={SCHEMA}"]
    lines += [f"# {line}" if line else "#" for line in head]
    lines.append("")
    section = ""
    for setting in sorted(settings, key=_place):
        name, _, inner = setting.key.partition(".")
        if inner and name != section:
            lines.append(f"{name}:")
        section = name
        lines.append(_line(("  " + inner) if inner else name, setting))
    return "\n".join(lines) + "\n"


_ORDER = ("model", "data", "output", "batch", "adapter", "optim", "eval", "checkpoint", "runtime")


def _place(setting: Setting) -> int:
    """Sections in the order of `_ORDER`; the rest follows. Within one nothing moves."""
    name = setting.key.partition(".")[0]
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _line(key: str, setting: Setting) -> str:
    value = dump({"x": setting.value}).removeprefix("x:").strip()
    if "\n" in value or isinstance(setting.value, dict):  # one line for one setting
        value = json.dumps(setting.value, ensure_ascii=False)
    reason = " ".join(setting.reason.split())
    if len(reason) > LONGEST:
        reason = reason[: LONGEST - 4] + " ..."
    text = f"{key}: {value}"
    return f"{text:{COLUMN}}  # {reason}" if reason else text


def check_schema(folder: Path) -> None:
    """UserError where a file of the schema's name is there that sftx did not write."""
    file = folder / SCHEMA
    if not file.exists():
        return
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    properties = known.get("properties") if isinstance(known, dict) else None
    if not isinstance(properties, dict) or not {"model", "data", "output"} <= properties.keys():
        raise UserError(
            f"sftx init: {file} is there and was not written by sftx; move it away, or write "
            "into another folder with to="
        )


def write_schema(folder: Path) -> None:
    """The JSON schema beside the YAML, by which editors complete and check it without a network."""
    text = json.dumps(as_json_schema(), indent=2) + "\n"
    (folder / SCHEMA).write_text(text, encoding="utf-8")
