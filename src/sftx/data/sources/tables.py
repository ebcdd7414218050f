"""From `data.train` and `data.eval` to tables: JSON lines cut into blocks, each file with its one
row format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, file_digest
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile

from sftx.arrow import rows_of
from sftx.data.sources import to_jsonl
from sftx.data.sources.formats import check_names, detect, renamed
from sftx.data.sources.read import Block, find_files, is_hub_name, is_lines, kind_of, rows_in, scan
from sftx.data.store.cache import Cache
from sftx.data.store.corpus import Origin
from sftx.remote import fetch_files, is_url
from sftx.settings.schema import Data, Source
from sftx.types import Json, RowError, UserError

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
            name = blake2b(str(self.files).encode(), digest_size=12).hexdigest()
            self.lines = scratch / f"{name}.lines"
            numbers = {"weight"}
            for column, ours in self.columns.items():
                if ours == "weight":
                    numbers.add(column)
            with self.lines.open("wb") as out:
                to_jsonl.convert(self.files, out, numbers)
        return self.lines

    def rows(self, scratch: Path, start: int = 0) -> Iterator[tuple[int, bytes, Json | RowError]]:
        """(line, raw line, value or what is wrong with it) of the rows, from block number `start`
        on.
        """
        with self.open_lines(scratch).open("rb") as file:
            for block in self.blocks[start:]:
                file.seek(block.start)
                data = file.read(block.stop - block.start)
                for line, raw, value in rows_in(data, block.line):
                    yield line, raw, _renamed(value, self.columns)


def _renamed(value: Json | RowError, columns: Mapping[str, str | None]) -> Json | RowError:
    if isinstance(value, RowError):
        return value
    try:
        return renamed(value, columns)
    except RowError as error:
        return error


def named_sources(
    given: str | list[str | Source] | None, rows: list[object] | None
) -> list[Source]:
    """The sources of a setting, each with a name; rows held in memory come last."""
    listed = [given] if isinstance(given, str) else given or []
    sources: list[Source] = []
    for item in listed:
        if isinstance(item, str):
            item = Source(path=item)
        sources.append(item)
    if rows is not None:
        sources.append(Source(path=MEMORY))
    named: dict[str, Source] = {}
    for source in sources:
        name = source.name or source.path
        if name in named:
            raise UserError(
                f"two data sources are called {name!r}; give each a name of its own, or one a "
                "weight of 2"
            )
        named[name] = source.model_copy(update={"name": name})
    return list(named.values())


def open_tables(
    sources: Sequence[Source], rows: list[object] | None, data: Data, cache: Cache, scratch: Path
) -> list[Table]:
    """Every file of `sources`, cut into blocks by content.

    Raises:
        UserError: a file is missing or unreadable, or its first row has no known format.
    """
    check_names(data.columns)
    tables: list[Table] = []
    for number, source in enumerate(sources):
        name = source.name or source.path
        if rows is not None and number == len(sources) - 1:  # `named_sources` puts them last
            tables.append(_table_of_rows(number, name, rows, data, scratch))
        elif is_hub_name(source.path):
            fetched = _hub_rows(source.path)
            tables.append(_table_of_rows(number, name, fetched, data, scratch))
        else:
            for origin, files in _grouped(source.path, cache):
                tables.append(_open_file(number, origin, files, data, cache, scratch))
    return tables


def _table_of_rows(
    number: int, name: str, rows: Iterable[object], data: Data, scratch: Path
) -> Table:
    """The table of rows that come from no file: they are written into one."""
    with NamedTemporaryFile(dir=scratch, suffix=".lines", delete=False) as out:
        out.writelines(to_jsonl.dump(row) + b"\n" for row in rows)
    origin = Origin(name, "row")
    table = Table(number, origin, [], [], data.format, Path(out.name), columns=data.columns)
    return _cut(table, data, scratch)


def _grouped(path: str, cache: Cache) -> Iterator[tuple[Origin, list[Path]]]:
    """Files one by one, but all plain texts together: each of them is only one row."""
    shown: dict[Path, str] = {}
    if is_url(path):
        shown = {copy: url for url, copy in fetch_files(path, cache.folder / "remote")}
        files = [found for copy in shown for found in find_files(str(copy))]
    else:
        files = find_files(path)
    texts: list[Path] = []
    for file in files:
        kind = kind_of(file)
        if kind == ".txt":
            texts.append(file)
        else:
            unit = "line" if kind in (".jsonl", ".csv", ".tsv") else "row"
            yield Origin(shown.get(file, str(file)), unit), [file]
    if texts:
        name = path
        if len(texts) == 1:
            name = str(texts[0])
        yield Origin(name, "row", tuple(map(str, texts))), texts


def _open_file(
    number: int, origin: Origin, files: list[Path], data: Data, cache: Cache, scratch: Path
) -> Table:
    table = Table(number, origin, files, [], data.format, None, columns=data.columns)
    if len(files) == 1 and is_lines(files[0]):
        table.lines = files[0]
        return _cut(table, data, scratch)
    columns = json.dumps(data.columns, sort_keys=True)
    decides = f"{to_jsonl.VERSION} {data.format} {data.on_bad_row} {columns}"
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
        table.blocks = [Block(*block) for block in known["blocks"]]
        table.form = known["form"]
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
    first = ""
    for line, _, value in table.rows(scratch):
        try:
            if isinstance(value, RowError):
                raise value
            return detect(value)
        except RowError as error:
            place = table.origin.place(line)
            if not skip:
                raise bad_row(place, str(error)) from None
            first = first or f"{place}: {error}"
    if first:
        raise UserError(first)
    return "text"  # no rows at all


def _hub_rows(name: str) -> Iterator[object]:
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
