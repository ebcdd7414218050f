"""Checks of single values in a row, with messages that name the field."""

from __future__ import annotations

import json
import math
from typing import Any

from sftx.types import RowError


def from_json(value: Any, at: str) -> Any:
    """The value a text of JSON stands for; other values as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise RowError(f"{at} is not valid JSON: {error.msg} at column {error.pos + 1}") from None


def checked_text(value: Any, field: str) -> str:
    """`value`, if it is text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise RowError(f"field {field!r} must be text, not {kind_name(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"field {field!r} holds half of a surrogate pair at character {error.start}") from None
    return value


def checked_weight(value: Any, field: str) -> float:
    """`value`, if it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RowError(f"{field} must be a number of at least 0, not {value!r}")
    return float(value)


def kind_name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    if value is None or value == []:
        return "null" if value is None else "an empty list"
    return names.get(type(value), type(value).__name__)
