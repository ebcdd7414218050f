"""The eight shapes that a row may have: how they are told apart, and the columns of each.

The shape is decided once per file, from its first row. A later row of another shape is an error,
not a guess.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import cast

from sftx.data.sources.validate import kind_name
from sftx.types import Json, RowError, UserError

REQUIRED: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "pairs": ("prompt", "completion"),
    "dialogue": ("dialogue",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "segments": ("segments",),
    "tokens": ("input_ids",),
}
"""The columns by which a format is known."""
CHAT_COLUMNS = ("tools", "chat_template_kwargs")
OPTIONAL: dict[str, tuple[str, ...]] = {
    "text": ("weight",),
    "pairs": ("weight", "system", "history", *CHAT_COLUMNS),
    "dialogue": ("weight", "system"),
    "messages": ("weight", "system", *CHAT_COLUMNS),
    "sharegpt": ("weight", "system", *CHAT_COLUMNS),
    "alpaca": ("weight", "input", "system", "history"),
    "segments": ("weight",),
    "tokens": ("weight", "labels", "weights"),
}
"""The columns that a format may have besides. The ledger names all others as not read."""
_PREFERENCE = "; this is preference data: to train on what was chosen, data.columns: {chosen: %s}"
_OF_OTHER_TOOLS = {
    ("question", "answer"): "; set data.columns: {question: prompt, answer: completion}",
    ("query", "response"): "; set data.columns: {query: prompt, response: completion}",
    ("prompt", "response"): "; set data.columns: {prompt: prompt, response: completion}",
    ("input", "output"): "; set data.columns: {input: prompt, output: completion}",
    ("prompt", "chosen"): _PREFERENCE % "completion",
    ("chosen", "rejected"): _PREFERENCE % "messages",
}
"""Columns of rows that other tools read, and what to do with them here."""
MOST_COLUMNS = 1000
"""A row with more columns is a mistake, and comparing their names would take minutes."""
SHOWN_COLUMNS = 10
_NOT_WEIGHTS = ("height", "freight", "sleight")  # words of their own
_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "completion_masks")


def detect(value: object) -> str:
    """The format of a row by its shape.

    Raises:
        RowError: no format has this shape, or more than one.
    """
    raw = cast("Json", value)
    if isinstance(raw, str):
        return "text"
    if isinstance(raw, list):
        return _detect_list(raw)
    if isinstance(raw, dict):
        return _detect_object(raw)
    raise RowError(f"a row must be an object, a list of texts or a text, not {kind_name(raw)}")


def _detect_object(raw: dict[str, Json]) -> str:
    check_count(raw)
    found = [name for name, fields in REQUIRED.items() if all(field in raw for field in fields)]
    if "tokens" in found:  # columns made from others: the tokens are what was meant
        return "tokens"
    if found == ["sharegpt"] and _all_have("role", raw["conversations"]):
        raise RowError(
            "`conversations` holds role and content: set data.columns: {conversations: messages}"
        )
    if len(found) > 1:
        names = " and ".join(found)
        raise RowError(f"the row fits the formats {names}; choose one with data.format")
    if not found:
        raise RowError(f"no format has the columns {names_of_columns(raw)}{_advice(raw)}")
    return found[0]


def _detect_list(raw: list[Json]) -> str:
    if raw and all(isinstance(item, str) for item in raw):
        return "dialogue"
    if _all_have("role", raw):
        return "messages"
    if _all_have("from", raw):
        return "sharegpt"
    if raw and all(isinstance(item, int) for item in raw):
        raise RowError(
            'a list of numbers: write tokens as {"input_ids": [...], "labels" or "weights": [...]}'
        )
    raise RowError(
        "a list must hold prompt and output texts in turn, or messages with role and content"
    )


def _all_have(field: str, value: Json) -> bool:
    """Whether a value is a list of objects that have this field."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and field in item for item in value)


def _advice(raw: dict[str, Json]) -> str:
    """What to do with a row that has the columns of no format."""
    for columns, advice in _OF_OTHER_TOOLS.items():
        if all(column in raw for column in columns):
            return advice
    for fields in REQUIRED.values():
        for field in fields:
            if field not in raw and (hint := misnamed(field, raw)):
                return hint
    return f"; expected one of {' | '.join('+'.join(fields) for fields in REQUIRED.values())}"


def names_of_columns(raw: dict[str, Json]) -> str:
    """The names of a row's columns, only the first where there are many."""
    names = ", ".join(map(str, list(raw)[:SHOWN_COLUMNS])) or "none"
    if len(raw) > SHOWN_COLUMNS:
        names += f" and {len(raw) - SHOWN_COLUMNS:,} more"
    return names


def check_count(raw: dict[str, Json]) -> None:
    """`RowError` for a row of more columns than any format could have."""
    if len(raw) > MOST_COLUMNS:
        raise RowError(
            f"the row has {len(raw):,} columns, at most {MOST_COLUMNS:,} are read; leave the "
            "others out"
        )


def misnamed(field: str, raw: dict[str, Json]) -> str:
    """A hint if a row lacks `field` and has a column of almost this name; else ""."""
    close = difflib.get_close_matches(field, map(str, raw), 1, 0.75)
    return f"; did you mean {field!r} where it says {close[0]!r}?" if close else ""


@lru_cache(1024)
def unused(columns: tuple[str, ...], form: str) -> tuple[str, ...]:
    """The columns of a row that its format does not read."""
    known = {*REQUIRED[form], *OPTIONAL[form]}
    return tuple(column for column in columns if column not in known)


@lru_cache(1024)
def misspelt(columns: tuple[str, ...], form: str) -> str:
    """What to say of a column that was probably meant for one that the format reads; "" if none."""
    absent = [name for name in OPTIONAL[form] if name not in columns]
    for column in unused(columns, form):
        close = difflib.get_close_matches(str(column), absent, 1, 0.8)
        if close and column not in _NOT_WEIGHTS:
            return f"unknown field {column!r}; did you mean {close[0]!r}?"
        if form == "tokens" and column in _MASKS:
            return f"field {column!r} is not read; rename it to 'weights'"
    return ""


def renamed(raw: Json, columns: Mapping[str, str | None]) -> Json:
    """A raw row with its columns named as `data.columns` says, without those that it names null.

    Raises:
        RowError: two columns would have the same name.
    """
    if not columns or not isinstance(raw, dict):
        return raw
    made: dict[str, Json] = {}
    origin: dict[str, str] = {}
    for column, value in raw.items():
        name = columns.get(column, column)
        if name is None:
            continue
        if name in made:
            raise RowError(
                f"data.columns: the columns {origin[name]!r} and {column!r} would both be "
                f"{name!r}; name the one to leave out null"
            )
        made[name] = value
        origin[name] = column
    return made


def check_names(columns: Mapping[str, str | None]) -> None:
    """`UserError` if `data.columns` gives a column a name that no format reads."""
    formats = (*REQUIRED.values(), *OPTIONAL.values())
    known = {name for names in formats for name in names}
    for column, name in columns.items():
        if name is not None and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise UserError(
                f"data.columns: {column}: {name!r} is a column that no format reads; {hint}"
            )
