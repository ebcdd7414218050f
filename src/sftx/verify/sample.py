"""A few rows of the user's data in a temporary folder, where everything that is measured happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sftx.data.dataset import load_corpora
from sftx.data.encoder import DEFAULT_LENGTH, Encoder
from sftx.data.sources.rows import parse
from sftx.data.sources.tables import Table, bad_row
from sftx.data.sources.to_jsonl import dump
from sftx.data.store.corpus import Corpus
from sftx.data.token_view import raw_tables
from sftx.data.tokenizer import Tokenizer
from sftx.model_config import positions
from sftx.settings.schema import Config
from sftx.types import Example, Row, RowError, UserError

WHOLE = 1 << 20
"""Tokens of an example that is not to be cut."""


@dataclass(frozen=True, slots=True)
class TakenRow:
    """A row, where it stands, and what the encoder makes of it; nothing is cut."""

    place: str
    row: Row
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows, and the settings of the user with these rows in place of all: the cache, the data
    and every output lie in `folder`. Examples of `corpus` are at most `config.data.max_length`
    tokens long.
    """

    folder: Path
    config: Config
    rows: list[TakenRow]
    corpus: Corpus


def take_sample(config: Config, folder: Path, count: int, tokens: int) -> Sample:
    """The first `count` rows, evenly from all files; in examples of up to `tokens` tokens.

    Raises:
        UserError: a file or row is wrong.
    """
    if config.model.add_tokens or config.model.add_special_tokens:
        raise UserError(
            "sftx verify: model.add_tokens: the new tokens have no rows in the model yet, so there "
            "is nothing to compare with; train, then verify the folder of the run"
        )
    cached = config.data.model_copy(update={"cache": str(folder / "cache"), "workers": 0})
    config = config.model_copy(update={"data": cached})
    tokenizer = Tokenizer.of_model(config.model)
    whole = Encoder(tokenizer, cached, WHOLE)
    rows: list[TakenRow] = []
    files: list[str] = []
    with raw_tables(config) as tables:
        tables = [table for table in tables if not table.held_out]
        each = -(-count // max(len(tables), 1))
        for number, table in enumerate(tables):
            file = folder / f"rows-{number}.jsonl"
            taken = list(islice(_good_rows(table, whole, cached.on_bad_row == "skip"), each))
            file.write_bytes(b"".join(line + b"\n" for line, _ in taken))
            rows += [row for _, row in taken]
            files += [str(file)] if taken else []
    if not rows:
        raise UserError("sftx verify: the data holds no row")
    longest = config.data.max_length or min(
        positions(config.model.path, DEFAULT_LENGTH), DEFAULT_LENGTH
    )
    nothing = {"rows": None, "eval": None, "eval_rows": None, "eval_split": 0.0, "columns": {}}
    short = {"train": files, "max_length": min(longest, tokens), "too_long": "split"}
    config = config.model_copy(update={"data": cached.model_copy(update=nothing | short)})
    corpus, _ = load_corpora(config, tokenizer, min(longest, tokens))
    return Sample(folder, config, rows, corpus)


def _good_rows(table: Table, encoder: Encoder, skip: bool) -> Iterator[tuple[bytes, TakenRow]]:
    """Each row as a line of JSON, and taken; a bad one is skipped or raised."""
    assert table.lines is not None
    for line, _, value in table.rows(table.lines.parent):
        place = table.origin.place(line)
        try:
            if isinstance(value, RowError):
                raise value
            row = parse(value, table.form)
            encoded = encoder.encode([row])[0]
            if isinstance(encoded, RowError):
                raise encoded
        except RowError as error:
            if skip:
                continue
            raise bad_row(place, str(error)) from None
        yield dump(value), TakenRow(place, row, encoded.examples)
