"""From `data.train` and `data.eval` to tables: JSON lines cut into blocks, each file with its one
row format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, file_digest
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from sftx.arrow import rows_of
from sftx.data.sources import to_jsonl
from sftx.data.sources.formats import check_names, detect, renamed
from sftx.data.sources.read import Block, find_files, is_hub_name, is_lines, kind_of, rows_in, scan
from sftx.data.store.cache import Cache
from sftx.data.store.corpus import Origin
from sftx.remote import fetch_files, is_url
from sftx.settings.schema import Data, Source
from sftx.types import RowError, UserError

MEMORY = "rows"  # the name of a source held in memory


@dataclass(slots=True)
class Table:
    """One file of rows (or many .txt documents): where it stands, its blocks, and the format of its
    rows.

    `lines` is the file of JSON lines that the blocks are cut from; None while it need not exist,
    because the blocks are known from an earlier time and are all encoded.
    """

    source: int
    origin: Origin
    files: list[Path]
    blocks: list[Block]
    form: str
    lines: Path | None
    held_out: bool = False
    columns: Mapping[str, str | None] = field(default_factory=dict[str, str | None])

    def open_lines(self, scratch: Path) -> Path:
        """The file of JSON lines, made now if it is needed and not there."""
        if self.lines is None:
            self.lines = scratch / (
                blake2b(str(self.files).encode(), digest_size=12).hexdigest() + ".lines"
            )
            with self.lines.open("wb") as out:
                renamed = {column for column, name in self.columns.items() if name == "weight"}
                to_jsonl.convert(self.files, out, {"weight", *renamed})
        return self.lines

    def rows(self, scratch: Path, start: int = 0) -> Iterator[tuple[int, bytes, Any | RowError]]:
        """(line, raw line, value or what is wrong with it) of the rows, from block number `start`
        on.
        """
        with self.open_lines(scratch).open("rb") as file:
            for block in self.blocks[start:]:
                file.seek(block.start)
                for line, raw, value in rows_in(file.read(block.stop - block.start), block.line):
                    yield line, raw, _renamed(value, self.columns)


def _renamed(value: Any | RowError, columns: Mapping[str, str | None]) -> Any | RowError:
    try:
        return value if isinstance(value, RowError) else renamed(value, columns)
    except RowError as error:
        return error


def named_sources(given: str | list[str | Source] | None, rows: list[Any] | None) -> list[Source]:
    """The sources of a setting, each with a name; rows held in memory come last."""
    listed = [given] if isinstance(given, str) else given or []
    sources = [Source(path=item) if isinstance(item, str) else item for item in listed]
    sources += [Source(path=MEMORY)] if rows is not None else []
    named = [source.model_copy(update={"name": source.name or source.path}) for source in sources]
    names = [source.name or "" for source in named]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"two data sources are called {double!r}; give each a name of its own, or one a "
            "weight of 2"
        )
    return named


def open_tables(
    sources: Sequence[Source], rows: list[Any] | None, data: Data, cache: Cache, scratch: Path
) -> list[Table]:
    """Every file of `sources`, cut into blocks by content.

    Raises:
        UserError: a file is missing or unreadable, or its first row has no known format.
    """
    check_names(data.columns)
    tables: list[Table] = []
    for number, source in enumerate(sources):
        name = source.name or source.path
        in_memory = (
            rows is not None and number == len(sources) - 1
        )  # `named_sources` puts them last
        if in_memory or is_hub_name(source.path):
            with NamedTemporaryFile(dir=scratch, suffix=".lines", delete=False) as out:
                if in_memory:
                    out.writelines(to_jsonl.dump(row) + b"\n" for row in rows or [])
                else:
                    out.writelines(to_jsonl.dump(row) + b"\n" for row in _hub_rows(source.path))
            table = Table(
                number,
                Origin(name, "row"),
                [],
                [],
                data.format,
                Path(out.name),
                columns=data.columns,
            )
            tables.append(_cut(table, data, scratch))
        else:
            tables += [
                _open_file(number, origin, files, data, cache, scratch)
                for origin, files in _grouped(source.path, cache)
            ]
    return tables


def _grouped(path: str, cache: Cache) -> Iterator[tuple[Origin, list[Path]]]:
    """Files one by one, but all plain texts together: each of them is only one row."""
    shown: dict[Path, str] = {}
    if is_url(path):
        shown = {copy: url for url, copy in fetch_files(path, cache.folder / "remote")}
        files = [found for copy in shown for found in find_files(str(copy))]
    else:
        files = find_files(path)
    texts = [file for file in files if kind_of(file) == ".txt"]
    for file in files:
        if kind_of(file) != ".txt":
            yield (
                Origin(
                    shown.get(file, str(file)),
                    "line" if kind_of(file) in (".jsonl", ".csv", ".tsv") else "row",
                ),
                [file],
            )
    if texts:
        yield (
            Origin(str(texts[0]) if len(texts) == 1 else path, "row", tuple(map(str, texts))),
            texts,
        )


def _open_file(
    number: int, origin: Origin, files: list[Path], data: Data, cache: Cache, scratch: Path
) -> Table:
    table = Table(number, origin, files, [], data.format, None, columns=data.columns)
    if len(files) == 1 and is_lines(files[0]):
        table.lines = files[0]
        return _cut(table, data, scratch)
    decides = (
        f"{to_jsonl.VERSION} {data.format} {data.on_bad_row} "
        f"{json.dumps(data.columns, sort_keys=True)}"
    )
    key = blake2b(decides.encode(), digest_size=20)
    for file in files:
        with file.open("rb") as stream:
            content = file_digest(stream, blake2b).digest()
        key.update(f"\n{kind_of(file)} {file.suffix} ".encode() + content)
    note = cache.path(key.hexdigest(), ".blocks")
    known = cache.read_note(note)
    if known is None:
        _cut(table, data, scratch)
        cache.write_note(note, {"blocks": table.blocks, "form": table.form})
    else:
        table.blocks, table.form = [Block(*block) for block in known["blocks"]], known["form"]
    return table


def _cut(table: Table, data: Data, scratch: Path) -> Table:
    """The table with its blocks and, where that is not set, its format."""
    try:
        with table.open_lines(scratch).open("rb") as stream:
            table.blocks = list(scan(stream, table.origin.name))
    except OSError as error:
        raise UserError(f"{table.origin.name}: cannot be read: {error.strerror}") from None
    if data.format == "auto":
        table.form = _detect_first(table, data.on_bad_row == "skip", scratch)
    return table


def bad_row(place: str, reason: str, others: int = 0) -> UserError:
    """The error of a bad row: its place and what is wrong with it lead, what to do about bad rows
    follows.
    """
    more = f"{others:,} more bad rows; " if others else ""
    return UserError(
        f"{place}: {reason}\n({more}data.on_bad_row=skip leaves bad rows out and lists them)"
    )


def _detect_first(table: Table, skip: bool, scratch: Path) -> str:
    """The format of the first row (of the first good one, if bad rows are skipped)."""
    first: UserError | None = None
    for line, _, value in table.rows(scratch):
        try:
            if isinstance(value, RowError):
                raise value
            return detect(value)
        except RowError as error:
            if not skip:
                raise bad_row(table.origin.place(line), str(error)) from None
            first = first or UserError(f"{table.origin.place(line)}: {error}")
    if first:
        raise first
    return "text"  # no rows at all


def _hub_rows(name: str) -> Iterator[Any]:
    """Rows of a data set on the hub, `owner/name[/config][:split]`; the split is `train` unless
    named.
    """
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise UserError(
            f"{name}: no such file or folder. If this is a data set on the hub: pip install "
            "'sftx[datasets]'"
        ) from None
    path, _, split = name.partition(":")
    owner, dataset, *config = path.split("/")
    try:
        loaded = datasets.load_dataset(f"{owner}/{dataset}", *config, split=split or "train")
    except (OSError, ValueError) as error:  # the hub's and the network's errors derive from these
        raise UserError(
            f"{name}: neither a file here nor a data set that could be fetched ({error})"
        ) from None
    yield from rows_of(loaded)
