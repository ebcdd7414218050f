"""Groups of examples that belong into the same step (`batch.group_by`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from sftx.data.sources.read import parse_line
from sftx.data.sources.tables import Table
from sftx.data.store.corpus import Corpus
from sftx.types import Json, UserError

Int64 = NDArray[np.int64]
WITHOUT_FIELD = ("none", "row", "prompt")
"""Groupings that need no field of the rows; any other name is one."""


def groups_of(corpus: Corpus, group_by: str) -> Int64 | None:
    """int64[N]: the number of each example's group; None where nothing is grouped."""
    match group_by:
        case "none":
            return None
        case "row":
            keys = corpus.table["origin"].astype(np.int64) << 40 | corpus.line
        case "prompt":
            keys = np.array([_prompt_hash(corpus, i) for i in range(len(corpus))], np.uint64)
        case _:
            keys = np.zeros(len(corpus), np.uint64)
            for number, by_line in enumerate(corpus.fields):
                mine = corpus.table["origin"] == number
                keys[mine] = by_line[corpus.line[mine]]
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def fields_of(
    tables: Sequence[Table], group_by: str, scratch: Path
) -> tuple[NDArray[np.uint64], ...]:
    """For every file, uint64[lines + 1]: a hash of the field that rows are grouped by, at the
    number of their line; () where no field is. A row without it is a group of its own.

    Raises:
        UserError: no row has such a field.
    """
    if group_by in WITHOUT_FIELD:
        return ()
    found: list[NDArray[np.uint64]] = []
    known = False
    for number, table in enumerate(tables):
        hashes: list[int] = [0]
        for line, raw, _ in table.rows(scratch):
            row = parse_line(raw)  # before `data.columns` names its fields anew
            key: list[Json] = ["alone", number, line]
            if isinstance(row, dict) and group_by in row:
                key, known = ["field", cast(dict[str, Json], row)[group_by]], True
            hashes += [0] * (line + 1 - len(hashes))
            hashes[line] = _hash(json.dumps(key, sort_keys=True).encode())
        found.append(np.array(hashes, np.uint64))
    if not known:
        raise UserError(
            f"batch.group_by: {group_by}: no row has a field of this name; other values: "
            f"{', '.join(WITHOUT_FIELD)}"
        )
    return tuple(found)


def grouped(groups: Int64, random: np.random.RandomState | None) -> Int64:
    """An order of examples with these group numbers in which each group stands together: groups in
    `random` order, or in that of their first examples; the order within a group stays.
    """
    _, first, which = np.unique(groups, return_index=True, return_inverse=True)
    by_place = np.argsort(first) if random is None else random.permutation(len(first))
    rank = np.empty(len(first), np.int64)
    rank[by_place] = np.arange(len(first))
    return np.argsort(rank[which], kind="stable")


def ends_of(groups: Int64) -> Int64:
    """Where runs of equal numbers end."""
    return np.append(np.flatnonzero(np.diff(groups)) + 1, len(groups))


def _prompt_hash(corpus: Corpus, index: int) -> int:
    """Hash of the tokens before the first target."""
    example = corpus.example(index)
    first = int((example.weights != 0).argmax())
    return _hash(example.ids[:first].tobytes())


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
