"""From nested dictionaries to a `Config`. Every mistake is found at once and named by its place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sftx.arrow import from_numpy, rows_of
from sftx.settings.describe import allowed, doc, section_of, shown, suggestion
from sftx.settings.schema import SHORT_FORMS, Config, Section
from sftx.settings.strict_yaml import KeyPath, Places, dotted
from sftx.types import UserError

if TYPE_CHECKING:
    from sftx.settings.keywords import Sections

_SHOWN = 50
"""Problems that are printed; of more, their number."""
DATA_FILE = re.compile(r"[^\n]+\.(jsonl|ndjson|json|txt|csv|tsv|parquet|arrow)(\.gz|\.zst)?")


def make_config(**sections: Unpack[Sections]) -> Config:
    """Make a `Config` from Python.

    For example `make_config(model="gpt2", data=rows, output="runs/a", batch={"epochs": 2})`.
    Sections are nested dictionaries, their short forms, or section objects of
    `sftx.settings.schema`. Raises `UserError` with every problem found, one per line.
    """
    if hasattr(sections.get("model"), "state_dict"):
        raise UserError(
            "model: an object of a model goes to sftx.train or sftx.steps; settings name a folder"
        )
    return checked(dict(sections), {}, [], source="")


def mapping(value: object) -> dict[str, object] | None:
    """`value` if it is a dictionary, else None."""
    if isinstance(value, dict):
        return cast("dict[str, object]", value)
    return None


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def long_form(name: str, value: object) -> object:
    """A section's value with its short form written out; an empty section is an empty mapping."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if value is None:
        return {}
    if name in SHORT_FORMS and _is_path(value):
        return {SHORT_FORMS[name]: value}
    if name == "data" and _holds_rows(value):
        return {"rows": value}
    return value


def _holds_rows(value: object) -> bool:
    """Whether rows can be taken out of a value: a list, a generator, a data set held in memory."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _rows(value: Any) -> list[object]:
    """The rows in such a value."""
    if hasattr(value, "itertuples"):
        # A DataFrame of pandas: its iterator gives the names of its columns.
        return [from_numpy(row) for row in value.to_dict("records")]
    if hasattr(value, "features"):  # a data set of `datasets`
        return list(rows_of(value))
    return list(value)


def checked(data: dict[str, object], places: Places, problems: list[str], *, source: str) -> Config:
    """The settings in `data`. `UserError` with the `problems` so far and all that are found here;
    `places` says where each value was written, `source` in which file.
    """
    known = _known(data, Config, (), places, problems)
    try:
        config = Config.model_validate(known, strict=True)
    except ValidationError as error:
        problems += _translated(error, known, places, source)
    else:
        if not problems:
            return config
    lines = problems[:_SHOWN]
    more = len(problems) - _SHOWN
    if more > 0:
        lines.append(f"and {more:,} more")
    raise UserError("\n".join(lines))


def _place(path: KeyPath, places: Places) -> str:
    """`run.yaml:12: ` for the value at `path`, or for the nearest above it that was written.

    Empty for Python.
    """
    while path not in places:
        if not path:
            return ""
        path = path[:-1]
    return f"{places[path]}: "


def _known(
    data: dict[str, object],
    section: type[Section],
    at: KeyPath,
    places: Places,
    problems: list[str],
) -> dict[str, object]:
    """`data` with short forms written out and unknown keys taken out, each of them reported."""
    known: dict[str, object] = {}
    for key, value in data.items():
        path = (*at, key)
        field = section.model_fields.get(key)
        if key in ("rows", "eval_rows") and _holds_rows(value):
            value = _rows(value)
        if field is None and len(problems) > _SHOWN:  # looking for what was meant takes longest
            problems.append(f"{dotted(path)}: no such setting")
        elif field is None:
            problems += _unknown(path, value, section, places)
        elif inner := section_of(field):
            value = long_form(key, value)
            below = mapping(value)
            known[key] = value if below is None else _known(below, inner, path, places, problems)
        else:
            known[key] = _plain(value, as_tuple=get_origin(field.annotation) is tuple)
            if key == "rows":
                problems += _paths_for_rows(value, at, _place(path, places))
    return known


def _plain(value: object, *, as_tuple: bool) -> object:
    """Paths as text, and lists and tuples as the one the schema wants."""
    if not isinstance(value, list | tuple):
        return _as_text(value)
    items = [_as_text(item) for item in cast("Sequence[object]", value)]
    if as_tuple:
        return tuple(items)
    return items


def _as_text(value: object) -> object:
    """A path as text, anything else as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    return value


def _paths_for_rows(value: object, at: KeyPath, place: str) -> list[str]:
    """What to say of rows that are a list of paths: nothing, or one line."""
    if not isinstance(value, list):
        return []
    items = cast("list[object]", value)
    texts = [str(_as_text(item)) for item in items if _is_path(item)]
    if not texts or len(texts) < len(items):
        return []
    # Where the list is written down in YAML, any text is a path.
    if not place and not all(map(_names_a_file, texts)):
        return []
    return [
        f"{place}{dotted(at)}: found a list of paths; a list here means rows in memory; for files "
        f"write `data: {{train: [{', '.join(texts[:3])}]}}`"
    ]


def _names_a_file(text: str) -> bool:
    if DATA_FILE.fullmatch(text):
        return True
    return 0 < len(text) < 250 and Path(text).exists()


def _unknown(path: KeyPath, value: object, section: type[Section], places: Places) -> list[str]:
    """What to say of a key that the schema does not have: one line, or one for each key of a
    foreign section.
    """
    key = str(path[-1])
    at = path[:-1]
    place = _place(path, places)
    if "." in key:
        head, _, tail = key.partition(".")
        nested = f"{head}={{{tail!r}: ...}}"
        if place:
            nested = f"`{head}:` with `{tail}:` beneath it"
        return [f"{place}{dotted(path)}: dotted keys are for the command line; write {nested}"]
    prefix = "".join(f"{part}." for part in at)
    inner = mapping(value)
    if inner and not get_close_matches(key, section.model_fields, 1, 0.75):
        lines: list[str] = []
        for name in inner:
            below = (*path, name)
            where = _place(below, places) + dotted(below)
            lines.append(f"{where}: no such setting; {suggestion(name)}")
        return lines
    return [f"{place}{dotted(path)}: no such setting; {suggestion(key, section, prefix)}"]


def _translated(
    error: ValidationError, data: dict[str, object], places: Places, source: str
) -> list[str]:
    """One line in our words for each setting that pydantic refused.

    Where it is known, the line is about the key inside the setting.
    """
    whole: dict[KeyPath, str] = {}
    inside: dict[KeyPath, str] = {}
    for problem in error.errors(include_url=False):
        kind = problem["type"]
        path, field, found = _refused(problem["loc"], data)
        rest = problem["loc"][len(path) :]
        name = f"{_place(path, places)}{dotted(path)}"
        if kind == "value_error":
            reason = problem.get("ctx", {})["error"]
            whole[path] = f"{name}: {reason}".removeprefix(": ")
        elif field is None:
            whole[path] = f"{source}: found {shown(data)}"
        elif kind == "missing" and not rest:
            first = f"{source}: " if source else ""
            whole[path] = f"{first}{dotted(path)}: missing: {doc(field)}"
        elif kind in _INSIDE:
            keys = path + _keys(rest)
            where = _place(keys, places) + dotted(keys)
            inside[keys] = f"{where}: {_INSIDE[kind]}; allowed: {allowed(field)}"
        else:
            whole.setdefault(path, f"{name}: found {shown(found)}; allowed: {allowed(field)}")
    for keys in inside:
        for length in range(len(keys) + 1):
            whole.pop(keys[:length], None)
    return [*whole.values(), *inside.values()]


_INSIDE = {"missing": "missing", "extra_forbidden": "no such setting"}
"""Problems of pydantic with a key inside a setting, and what we say of it."""


def _keys(location: KeyPath) -> KeyPath:
    """The keys in the rest of a location of pydantic, which also names the types that it tried."""
    return tuple(part for part in location if isinstance(part, int) or part == location[-1])


def _refused(
    location: KeyPath, data: dict[str, object]
) -> tuple[KeyPath, FieldInfo | None, object]:
    """The setting that a location of pydantic lies in: its path, its field, and its value."""
    section: type[Section] | None = Config
    path: KeyPath = ()
    field: FieldInfo | None = None
    found: object = data
    for part in location:
        if section is None or part not in section.model_fields:
            break
        field = section.model_fields[str(part)]
        section = section_of(field)
        path = (*path, part)
        inner = mapping(found)
        if inner is not None:
            found = inner.get(str(part))
    return path, field, found
