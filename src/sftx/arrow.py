"""Rows that come from Arrow, whose structs give every row the keys of all rows.

The question is which nulls somebody wrote. A struct whose fields are each filled in all rows, or in
none, was not put together from different keys: its nulls are real. In any other struct a null may
stand for a key that a row did not have, and is left out. The keys of a map are always those that
were written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Shape:
    """What is known of the values at one place in the rows, if they hold structs."""

    fields: dict[str, Shape] = field(default_factory=dict)  # of a struct
    item: Shape | None = None  # of a list
    structs: int = 0  # how many structs stand here
    # In how many of them each field is not null.
    filled: Counter[str] = field(default_factory=Counter)

    def invents(self) -> bool:
        """Whether some struct here may have keys that its row did not have."""
        return any(0 < self.filled[name] < self.structs for name in self.fields)


def shape_of(batches: Iterable[Any]) -> Shape:
    """The shape of the rows in record batches of pyarrow, as a struct of their columns."""
    rows = Shape()
    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            _count(rows.fields.setdefault(name, Shape()), column)
    return rows


def _count(shape: Shape, values: Any) -> None:
    import pyarrow as arrow

    kind = values.type
    of = arrow.types
    if of.is_struct(kind):
        present = values.drop_null()
        shape.structs += len(present)
        names = [column.name for column in kind]
        for name, child in zip(names, present.flatten(), strict=True):
            shape.filled[name] += len(child) - child.null_count
            _count(shape.fields.setdefault(name, Shape()), child)
    elif of.is_list(kind) or of.is_large_list(kind) or of.is_fixed_size_list(kind):
        if shape.item is None:
            shape.item = Shape()
        _count(shape.item, values.flatten())


def as_written(row: object, shape: Shape | None = None) -> object:
    """A row without the null keys that Arrow may have invented; its columns all stay.

    Without a `shape`, no null key inside a column is taken for real.
    """
    if not isinstance(row, dict):
        return row
    made: dict[str, object] = {}
    for name, value in row.items():
        if shape is None:
            made[name] = _without_nulls(value)
        else:
            made[name] = _clean(value, shape.fields.get(name))
    return made


def rows_of(dataset: Any) -> Iterator[object]:
    """The rows of a data set of `datasets`, which keeps them in Arrow."""
    # A data set that streams has no table.
    table = getattr(getattr(dataset, "data", None), "table", None)
    shape = None
    if table is not None:
        shape = shape_of(table.to_batches())
    for row in dataset:
        yield as_written(row, shape)


def from_numpy(row: dict[str, object]) -> dict[str, object]:
    """A row of a DataFrame.

    What pandas read from Arrow it holds as arrays, in whose structs no null is certain.
    """
    made = dict(row)
    for name, value in row.items():
        if getattr(value, "ndim", 0) > 0:
            made[name] = _without_nulls(_plain(value))
    return made


def _plain(value: Any) -> object:
    """Arrays as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if getattr(value, "ndim", 0):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _clean(value: Any, shape: Shape | None) -> object:
    if shape is None or value is None:
        return value
    if shape.item is not None:
        return [_clean(item, shape.item) for item in value]
    if not shape.fields:
        return value
    invents = shape.invents()
    kept: dict[str, object] = {}
    for name, item in value.items():
        if item is not None or not invents:
            kept[name] = _clean(item, shape.fields.get(name))
    return kept


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
