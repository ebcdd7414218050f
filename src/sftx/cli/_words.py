"""The words of the command line: verbs, the keys that each takes, the values that a key allows."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import UnionType
from typing import Literal, NamedTuple, Union, get_args, get_origin

from sftx.cli import declared
from sftx.cli._map import verb_of
from sftx.settings.describe import settings
from sftx.settings.schema import SHORT_FORMS


class Words(NamedTuple):
    """`verbs` with a sentence each; `keys` of each verb; `values` of the settings that allow few,
    for the verbs that read settings.
    """

    verbs: dict[str, str]
    keys: dict[str, list[str]]
    with_settings: list[str]
    values: dict[str, list[str]]


@cache
def words() -> Words:
    """All of them, from the files of the verbs and the schema."""
    found = [verb_of(path) for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))]
    keys: dict[str, list[str]] = {}
    with_settings: list[str] = []
    for verb in found:
        told = declared(verb.name)
        keys[verb.name] = [key for key in told.extra if not key.endswith(".")]
        if "config" in told.takes:
            keys[verb.name] += [*SHORT_FORMS, *settings()]
            with_settings.append(verb.name)
    values: dict[str, list[str]] = {}
    for key, field in settings().items():
        allowed = literals(field.annotation)
        if allowed:
            values[key] = allowed
    values |= {
        section: values[f"{section}.{main}"]
        for section, main in SHORT_FORMS.items()
        if f"{section}.{main}" in values
    }
    return Words({verb.name: verb.doc for verb in found}, keys, with_settings, values)


def literals(annotation: object) -> list[str]:
    """The values that a type names one by one: those of its literals, true and false."""
    if annotation is bool:
        return ["true", "false"]
    origin = get_origin(annotation)
    if origin is Literal:
        return [str(value) for value in get_args(annotation)]
    if origin in (Union, UnionType):
        return [value for part in get_args(annotation) for value in literals(part)]
    return []
