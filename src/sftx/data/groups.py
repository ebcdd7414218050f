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
from sftx.types import Int64, Json, UserError

WITHOUT_FIELD = ("none", "row", "prompt")
"""Groupings that need no field of the rows; any other name is one."""


def groups_of(corpus: Corpus, group_by: str) -> Int64 | None:
    """int64[N]: the number of each example's group; None where nothing is grouped."""
    match group_by:
        case "none":
            return None
        case "row":
            file = corpus.table["origin"].astype(np.int64)
            keys = file << 40 | corpus.line
        case "prompt":
            hashes = [_prompt_hash(corpus, i) for i in range(len(corpus))]
            keys = np.array(hashes, np.uint64)
        case _:
            keys = np.zeros(len(corpus), np.uint64)
            for number, by_line in enumerate(corpus.fields):
                mine = corpus.table["origin"] == number
                keys[mine] = by_line[corpus.line[mine]]
    _, groups = np.unique(keys, return_inverse=True)
    return groups.astype(np.int64)


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
        hashes: dict[int, int] = {}
        for line, raw, _ in table.rows(scratch):
            row = parse_line(raw)  # before `data.columns` names its fields anew
            key: list[Json] = ["alone", number, line]
            if isinstance(row, dict) and group_by in row:
                value = cast(dict[str, Json], row)[group_by]
                key = ["field", value]
                known = True
            text = json.dumps(key, sort_keys=True)
            hashes[line] = _hash(text.encode())
        by_line = np.zeros(max(hashes, default=0) + 1, np.uint64)
        by_line[list(hashes)] = list(hashes.values())
        found.append(by_line)
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
    count = len(first)
    by_place = np.argsort(first) if random is None else random.permutation(count)
    rank = np.empty(count, np.int64)
    rank[by_place] = np.arange(count)
    return np.argsort(rank[which], kind="stable")


def ends_of(groups: Int64) -> Int64:
    """Where runs of equal numbers end."""
    changes = np.flatnonzero(np.diff(groups))
    return np.append(changes + 1, len(groups))


def _prompt_hash(corpus: Corpus, index: int) -> int:
    """Hash of the tokens before the first target."""
    example = corpus.example(index)
    is_target = example.weights != 0
    prompt = example.ids[: is_target.argmax()]
    return _hash(prompt.tobytes())


def _hash(content: bytes) -> int:
    digest = blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little")
