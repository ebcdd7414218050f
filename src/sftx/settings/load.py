"""From a YAML file and the command line to a `Config`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sftx.settings.describe import section_of, shown
from sftx.settings.make import DATA_FILE, checked, long_form, mapping
from sftx.settings.read_yaml import LARGEST, check_text_size, parse
from sftx.settings.schema import Config
from sftx.settings.strict_yaml import Places, dotted
from sftx.types import UserError

_COMMAND_LINE = "command line"


def load_config(
    path: str | None, overrides: Sequence[str] = (), defaults: Sequence[str] = ()
) -> Config:
    """Read the YAML file at `path` (or none), apply overrides, and check the whole.

    Overrides look like `batch.epochs=2`. `defaults` look the same and stand for top-level keys that
    neither the file nor an override names. Relative paths are relative to the working directory.
    Raises `UserError` with every problem found, one per line, each with its file and line and its
    dotted key.
    """
    problems: list[str] = []
    value, places = parse("" if path is None else _read(path), path or "", problems)
    data = {} if value is None else mapping(value)
    if data is None:
        raise UserError(f"{path}: found {shown(value)}; a run is a mapping such as `model: PATH`")
    given = set(data)
    given.update(map(_top_level, overrides))
    absent = [default for default in defaults if _top_level(default) not in given]
    for override in (*absent, *overrides):
        _override(data, override, places, problems)
    return checked(data, places, problems, source=path or "")


def _top_level(override: str) -> str:
    """The first part of the key of an override."""
    return re.split("[.=]", override)[0]


def _read(path: str) -> str:
    if Path(path).is_dir():
        raise UserError(f"{path}: a folder, where a YAML file is expected; is it model={path}?")
    if DATA_FILE.fullmatch(path) and not path.endswith(".json"):
        raise UserError(f"{path}: where a YAML file is expected; data is given as data={path}")
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST + 1)
        check_text_size(len(content), path)
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _override(data: dict[str, object], override: str, places: Places, problems: list[str]) -> None:
    """Put `a.b=c` into `data`.

    A section given whole is merged into what stands there; a setting is replaced.
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
    given: dict[tuple[str, ...], object] = {path: value}
    section = _section(key, value)
    if section is not None:
        data[key] = long_form(key, data.get(key))
        given = {(key, name): item for name, item in section.items()}
    for at, item in given.items():
        inner = _holder(data, at, places)
        if isinstance(inner, str):
            problems.append(f"{_COMMAND_LINE}: {key}: {inner} is not a section")
            return
        if places.get(at) == _COMMAND_LINE:
            problems.append(f"{_COMMAND_LINE}: {dotted(at)}: given twice")
        name = at[-1]
        inner[name] = item
    for written in (path, *given):
        places[written] = _COMMAND_LINE
    for rest in below:
        places[(*path, *rest)] = _COMMAND_LINE


def _section(key: str, value: object) -> dict[str, object] | None:
    """The settings in a section that is given whole; None where `key` is no section."""
    field = Config.model_fields.get(key)
    if field is None or section_of(field) is None:
        return None
    return mapping(long_form(key, value))


def _holder(
    data: dict[str, object], at: tuple[str, ...], places: Places
) -> dict[str, object] | str:
    """The dictionary that holds the setting `at`, or the name of what stands there instead.

    Dictionaries that are missing on the way are made.
    """
    inner = data
    for depth, part in enumerate(at[:-1], 1):
        path = at[:depth]
        below = inner.get(part, {})
        if depth == 1:
            below = long_form(part, inner.get(part))
        inner[part] = below
        places.setdefault(path, _COMMAND_LINE)
        found = mapping(below)
        if found is None:
            return dotted(path)
        inner = found
    return inner
