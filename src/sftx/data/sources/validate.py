"""Checks of single values in a row, with messages that name the field."""

from __future__ import annotations

import json

from sftx.types import Json, RowError

_LARGEST = 3.4e38  # weights are kept as float32


def from_json(text: str, at: str = "") -> Json:
    """The value that a text of JSON stands for.

    Raises:
        RowError: the text is not JSON. The message says where it stops being JSON, after `at`, the
            name of the field.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" starting at")
        is_cut = error.pos >= len(text.rstrip()) or problem.startswith("Unterminated")
        problem += f" at column {error.pos + 1}"
        if text.strip() == "[":
            problem += "; a JSON array of rows is read from a file named .json"
        elif is_cut and not at:
            problem += "; the line is cut off"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError:
        problem = "a number of thousands of digits"
    where = f"{at} is " if at else ""
    raise RowError(f"{where}not valid JSON: {problem}")


def checked_text(value: Json, field: str) -> str:
    """`value`, if it is text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise RowError(f"field {field!r} must be text, not {kind_name(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"field {field!r} holds half of a surrogate pair at character {error.start}"
            ) from None
    return value


def checked_list(value: Json, field: str, items: str) -> list[Json]:
    """`value`, if it is a list that is not empty; `items` says what it must hold."""
    if not isinstance(value, list) or not value:
        raise RowError(f"field {field!r} must be a list of {items}, not {kind_name(value)}")
    return value


def check_spelling(value: object, field: str) -> None:
    """`RowError` if a text anywhere inside `value` (any JSON) cannot be written as UTF-8."""
    try:
        checked_text(json.dumps(value, ensure_ascii=False), field)
    except RecursionError:
        raise RowError(f"field {field!r} is nested too deeply") from None


def checked_weight(value: Json, field: str) -> float:
    """`value`, if it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise RowError(
            f"{field} must be a number of at least 0 (and at most {_LARGEST:g}), not {value!r}"
        )
    return float(value)


def product(first: float, second: float) -> float:
    """The product of two weights; `RowError` if it is too large to be kept."""
    value = first * second
    if value > _LARGEST:
        raise RowError(f"the weights {first:g} and {second:g} multiply to more than {_LARGEST:g}")
    return value


def kind_name(value: object) -> str:
    """What a JSON value is, in words."""
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
    }
    if value == []:
        return "an empty list"
    return names.get(type(value), type(value).__name__)
