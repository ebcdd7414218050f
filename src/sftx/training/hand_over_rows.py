"""The rows of a file that an export is checked with."""

from __future__ import annotations

from itertools import islice

from sftx.data.token_view import raw_tables, read_rows
from sftx.settings.make import make_config
from sftx.types import Row, UserError


def rows_of_file(path: str, count: int) -> tuple[Row, ...]:
    """The first `count` rows of a file (or of what else `data.train` may name) that can be read."""
    config = make_config(model="none", data={"train": path}, output="unused")
    found: list[Row] = []
    with raw_tables(config) as tables:
        for table in tables:
            wanted = count - len(found)
            rows = islice(read_rows(table), wanted)
            found += [row for _, row in rows if isinstance(row, Row)]
    if not found:
        raise UserError(f"sftx export: data={path}: no row there can be read")
    return tuple(found)
