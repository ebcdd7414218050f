"""From YAML, the command line and Python to a `Config`, with every mistake found at once and named
by its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_origin

from pydantic import BaseModel, ValidationError

from sftx.arrow import from_numpy, rows_of
from sftx.settings.describe import allowed, doc, section_of, shown, suggestion
from sftx.settings.schema import SHORT_FORMS, Config, Section
from sftx.settings.strict_yaml import LARGEST, KeyPath, Places, check_text_size, dotted, parse
from sftx.types import UserError

if TYPE_CHECKING:
    from sftx.settings.keywords import Sections

_COMMAND_LINE = "command line"
_SHOWN = 50
"""Problems that are printed; of more, their number."""
_DATA_FILE = re.compile(r"[^\n]+\.(jsonl|ndjson|json|txt|csv|tsv|parquet|arrow)(\.gz|\.zst)?")


def load_config(
    path: str | None, overrides: Sequence[str] = (), defaults: Sequence[str] = ()
) -> Config:
    """Read the YAML file at `path` (or none), apply overrides such as `batch.epochs=2`, and check
    the whole.

    `defaults` look like overrides and stand for top-level keys that neither the file nor an
    override names. Relative paths are relative to the working directory. Raises `UserError` with
    every problem found, one per line, each with its file and line and its dotted key.
    """
    problems: list[str] = []
    data, places = parse("" if path is None else _read(path), path or "", problems)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: found {shown(data)}; a run is a mapping such as `model: PATH`")
    given = {re.split("[.=]", override)[0] for override in overrides} | set(data)
    absent = [default for default in defaults if re.split("[.=]", default)[0] not in given]
    for override in (*absent, *overrides):
        _override(data, override, places, problems)
    return _checked(data, places, problems, source=path or "")


def make_config(**sections: Unpack[Sections]) -> Config:
    """Make a `Config` from Python: `make_config(model="gpt2", data=rows, output="runs/a",
    batch={"epochs": 2})`.

    Sections are nested dictionaries, their short forms, or section objects of
    `sftx.settings.schema`. Raises `UserError` with every problem found, one per line.
    """
    if hasattr(sections.get("model"), "state_dict"):
        raise UserError(
            "model: an object of a model goes to sftx.train or sftx.steps; settings name a folder"
        )
    return _checked(dict(sections), {}, [], source="")


def _read(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST + 1)
        check_text_size(len(content), path)
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _long_form(name: str, value: Any) -> Any:
    """A section's value with its short form written out; an empty section is an empty mapping."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if value is None:
        return {}
    if name in SHORT_FORMS and isinstance(value, str | os.PathLike):
        return {SHORT_FORMS[name]: value}
    return {"rows": value} if name == "data" and _holds_rows(value) else value


def _holds_rows(value: Any) -> bool:
    """Whether rows can be taken out of a value: a list, a generator, a data set held in memory."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _rows(value: Any) -> list[Any]:
    """The rows in such a value."""
    if hasattr(
        value, "itertuples"
    ):  # a DataFrame of pandas, whose iterator gives the names of its columns
        return [from_numpy(row) for row in value.to_dict("records")]
    return list(rows_of(value)) if hasattr(value, "features") else list(value)  # of `datasets`


def _override(data: dict[str, Any], override: str, places: Places, problems: list[str]) -> None:
    """Put `a.b=c` into `data`. A section given whole is merged into what stands there; a setting is
    replaced.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    path = tuple(key.split("."))
    if not equals or not all(path):
        problems.append(
            f"{_COMMAND_LINE}: {override!r}: write a setting as key=value, for example "
            "batch.epochs=2"
        )
        return
    value, below = parse(text, f"{_COMMAND_LINE}: {key}", problems, numbered=False)
    given = {path: value}
    field = Config.model_fields.get(key)
    if field and section_of(field) and isinstance(section := _long_form(key, value), dict):
        data[key] = _long_form(key, data.get(key))
        given = {(key, name): item for name, item in section.items()}
    for at, item in given.items():
        inner = data
        for depth, part in enumerate(at[:-1]):
            inner[part] = _long_form(part, inner.get(part)) if depth == 0 else inner.get(part, {})
            places.setdefault(at[: depth + 1], _COMMAND_LINE)
            inner = inner[part]
            if not isinstance(inner, dict):
                problems.append(
                    f"{_COMMAND_LINE}: {key}: {dotted(at[: depth + 1])} is not a section"
                )
                return
        if places.get(at) == _COMMAND_LINE:
            problems.append(f"{_COMMAND_LINE}: {dotted(at)}: given twice")
        inner[at[-1]] = item
    places.update(dict.fromkeys([path, *given, *((*path, *rest) for rest in below)], _COMMAND_LINE))


def _checked(data: dict[str, Any], places: Places, problems: list[str], *, source: str) -> Config:
    known = _known(data, Config, (), places, problems)
    try:
        config = Config.model_validate(known, strict=True)
    except ValidationError as error:
        problems += _translated(error, known, places, source)
    else:
        if not problems:
            return config
    more = [f"and {len(problems) - _SHOWN:,} more"] if len(problems) > _SHOWN else []
    raise UserError("\n".join(problems[:_SHOWN] + more))


def _place(path: KeyPath, places: Places) -> str:
    """`run.yaml:12: ` for the value at `path` or the nearest above it that was written; empty for
    Python.
    """
    while path not in places and path:
        path = path[:-1]
    return f"{places[path]}: " if path in places else ""


def _known(
    data: dict[str, Any], section: type[Section], at: KeyPath, places: Places, problems: list[str]
) -> Any:
    """`data` with short forms written out and unknown keys taken out, each of them reported."""
    known: dict[str, Any] = {}
    for key, value in data.items():
        path = (*at, key)
        field = section.model_fields.get(key)
        value = _rows(value) if key in ("rows", "eval_rows") and _holds_rows(value) else value
        if field is None and len(problems) > _SHOWN:  # looking for what was meant takes longest
            problems.append(f"{dotted(path)}: no such setting")
        elif field is None:
            problems += _unknown(path, value, section, places)
        elif inner := section_of(field):
            value = _long_form(key, value)
            known[key] = (
                _known(value, inner, path, places, problems) if isinstance(value, dict) else value
            )
        else:
            known[key] = _plain(value, as_tuple=get_origin(field.annotation) is tuple)
            place = _place(path, places)
            if key == "rows" and (paths := _as_paths(value, bool(place))):
                short = (
                    f"{place}{dotted(at)}: found a list of paths; a list here means rows in "
                    "memory; "
                )
                problems.append(
                    f"{short}for files write `data: {{train: [{', '.join(paths[:3])}]}}`"
                )
    return known


def _plain(value: Any, *, as_tuple: bool) -> Any:
    """Paths as text, and lists and tuples as the one the schema wants."""
    if isinstance(value, list | tuple):
        items = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
        return tuple(items) if as_tuple else items
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _as_paths(value: Any, written: bool) -> list[str]:
    """The texts of a list that holds names of data files alone; where it is `written` down in YAML,
    any text is one.
    """
    if not isinstance(value, list) or not all(
        isinstance(item, str | os.PathLike) for item in value
    ):
        return []
    texts = [os.fspath(item) for item in value]
    found = (
        written or _DATA_FILE.fullmatch(text) or (0 < len(text) < 250 and Path(text).exists())
        for text in texts
    )
    return texts if all(found) else []


def _unknown(path: KeyPath, value: Any, section: type[Section], places: Places) -> list[str]:
    """What to say of a key that the schema does not have: one line, or one for each key of a
    foreign section.
    """
    key, at = str(path[-1]), path[:-1]
    place = _place(path, places)
    if "." in key:
        head, _, tail = key.partition(".")
        nested = f"`{head}:` with `{tail}:` beneath it" if place else f"{head}={{{tail!r}: ...}}"
        return [f"{place}{dotted(path)}: dotted keys are for the command line; write {nested}"]
    prefix = "".join(f"{part}." for part in at)
    if (
        isinstance(value, dict)
        and value
        and not get_close_matches(key, section.model_fields, 1, 0.75)
    ):
        inner = [(*path, name) for name in value]
        return [
            f"{_place(at, places)}{dotted(at)}: no such setting; {suggestion(str(at[-1]))}"
            for at in inner
        ]
    return [f"{place}{dotted(path)}: no such setting; {suggestion(key, section, prefix)}"]


def _translated(
    error: ValidationError, data: dict[str, Any], places: Places, source: str
) -> list[str]:
    """One line in our words for each setting that pydantic refused, or for each key inside it where
    that is known.
    """
    whole: dict[KeyPath, str] = {}
    inside: dict[KeyPath, str] = {}
    for problem in error.errors(include_url=False):
        section, path, field, found = Config, (), None, data
        for part in problem["loc"]:
            if section is None or part not in section.model_fields:
                break
            field = section.model_fields[str(part)]
            section, path = section_of(field), (*path, part)
            found = found.get(part) if isinstance(found, dict) else found
        rest = problem["loc"][len(path) :]
        name = f"{_place(path, places)}{dotted(path)}"
        if problem["type"] == "value_error":
            whole[path] = f"{name}: {problem.get('ctx', {})['error']}".removeprefix(": ")
        elif field is None:
            whole[path] = f"{source}: found {shown(data)}"
        elif problem["type"] == "missing" and not rest:
            first = f"{source}: " if source else ""
            whole[path] = f"{first}{dotted(path)}: missing: {doc(field)}"
        elif problem["type"] in ("missing", "extra_forbidden"):
            keys = (*path, *(part for part in rest if isinstance(part, int) or part == rest[-1]))
            what = "missing" if problem["type"] == "missing" else "no such setting"
            inside[keys] = (
                f"{_place(keys, places)}{dotted(keys)}: {what}; allowed: {allowed(field)}"
            )
        else:
            whole.setdefault(path, f"{name}: found {shown(found)}; allowed: {allowed(field)}")
    outer = {
        path: line
        for path, line in whole.items()
        if not any(keys[: len(path)] == path for keys in inside)
    }
    return [*outer.values(), *inside.values()]
