"""Every file format that is not JSONL becomes lines of JSON, so that all that follows knows one
shape.
"""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from sftx.arrow import Shape, as_written, shape_of
from sftx.data.sources.read import CHUNK, ERROR_MARK, kind_of
from sftx.data.sources.validate import from_json
from sftx.types import RowError, UserError

VERSION = "5"  # raise when the lines made from a file change


def dump(value: object) -> bytes:
    """One row as a line of JSON. What JSON cannot hold becomes an object, which no field accepts as
    text.
    """

    def plain(item: object) -> object:
        if isinstance(item, np.ndarray | np.generic):
            return cast("object", item.tolist())
        return {"unreadable": type(item).__name__}

    try:
        return json.dumps(value, default=plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        # Keys that are no text, or a list that contains itself.
        return ERROR_MARK + str(error).encode()


def convert(files: list[Path], out: IO[bytes], numbers: Collection[str] = ("weight",)) -> None:
    """Write the rows of `files` (one file, or several .txt: one document each) to `out` as JSON
    lines. Text of a table in the columns `numbers` becomes a number where it is one.

    Line i of `out` is row i of the file, or what stood on line i of a .csv or compressed .jsonl.
    """
    for file in files:
        try:
            with _open(file) as stream:
                if kind_of(file) in (".csv", ".tsv"):
                    _table(stream, out, str(file), numbers)
                else:
                    _CONVERTERS[kind_of(file)](stream, out, str(file))
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise  # there is no room for the rows
            raise UserError(
                f"{file}: the file cannot be read ({error}); is it damaged or cut off?"
            ) from None


def _open(file: Path) -> IO[bytes]:
    name = file.name.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(file))
    if not name.endswith(".zst"):
        return file.open("rb")
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{file}: reading .zst needs one more package: pip install 'sftx[zstd]'"
        ) from None
    try:
        _check_frames(file, zstandard.ZstdDecompressor())
    except zstandard.ZstdError as error:
        raise EOFError(error) from None
    return zstandard.ZstdDecompressor().stream_reader(
        file.open("rb"), read_across_frames=True, closefd=True
    )


def _check_frames(file: Path, decompressor: Any) -> None:
    """`EOFError` if a .zst file ends inside a frame: reading it as a stream, its end would go
    unnoticed.
    """
    frame = None
    with file.open("rb") as packed:
        while chunk := packed.read(1 << 16):
            while chunk:
                frame = frame or decompressor.decompressobj()
                frame.decompress(chunk)
                chunk = frame.unused_data
                frame = None if frame.eof else frame
    if frame:
        raise EOFError("its last frame is not whole")


def _lines(stream: IO[bytes], out: IO[bytes], name: str) -> None:
    shutil.copyfileobj(stream, out, CHUNK)


def _text(stream: IO[bytes], out: IO[bytes], name: str) -> None:
    data = stream.read()
    wrong = _no_text(data)
    if wrong is None:
        out.write(dump(data.decode("utf-8-sig")) + b"\n")
        return
    offset, what = wrong
    line = data.count(b"\n", 0, offset) + 1
    out.write(ERROR_MARK + f"{what} in line {line}\n".encode())


def _json(stream: IO[bytes], out: IO[bytes], name: str) -> None:
    """A JSON array, row by row; also JSON lines under the name .json."""
    text = _decoded(stream.read(), name)
    begin = _skip(text, 0)
    if text[begin : begin + 1] == "[" and not _is_list_line(text, begin):
        _Array(text, name).write(begin, out)
        return
    try:
        from_json(text[begin:].split("\n", 1)[0] or "null")
    except RowError:
        raise UserError(
            f"{name}: expected a JSON array of rows, or one JSON value per line"
        ) from None
    out.write(text.encode())


def _decoded(data: bytes, name: str, line: int = 1) -> str:
    """The text of what begins in that line of the file."""
    wrong = _no_text(data)
    if wrong is None:
        return data.decode("utf-8-sig")
    offset, what = wrong
    line += data.count(b"\n", 0, offset)
    raise UserError(f"{name}:{line}: {what}")


def _no_text(data: bytes) -> tuple[int, str] | None:
    """Where bytes are not text in UTF-8, and why not. UTF-16 without a mark is full of zeros, which
    UTF-8 allows.
    """
    zero = data.find(b"\0")
    if zero >= 0:
        return zero, "not UTF-8 text: byte 0x00 (is it UTF-16?)"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start, f"not UTF-8: byte 0x{data[error.start]:02x}"
    return None


class _Array:
    """A JSON array in the text of a file that messages call `name`."""

    def __init__(self, text: str, name: str) -> None:
        self._text = text
        self._name = name
        self._decode = json.JSONDecoder().raw_decode

    def write(self, begin: int, out: IO[bytes]) -> None:
        """Write the rows of the array that begins there, each on a line."""
        text = self._text
        position = _skip(text, begin + 1)
        while text[position : position + 1] != "]":
            row, position = self._row(position)
            out.write(dump(row) + b"\n")
            position = _skip(text, position)
            behind = text[position : position + 1]
            if behind not in (",", "]"):
                raise self._wrong("expected ',' or ']' after a row", position)
            if behind == ",":
                position = _skip(text, position + 1)
        position = _skip(text, position + 1)
        if position < len(text):
            raise self._wrong("expected nothing after the array", position)

    def _row(self, position: int) -> tuple[object, int]:
        """The row at a position, and where it ends."""
        try:
            return self._decode(self._text, position)
        except json.JSONDecodeError as error:
            raise self._wrong(error.msg.removesuffix(" starting at"), error.pos) from None
        except (RecursionError, ValueError):
            raise self._wrong(
                "nested too deeply, or a number of thousands of digits, in the row", position
            ) from None

    def _wrong(self, what: str, at: int) -> UserError:
        line = self._text.count("\n", 0, at) + 1
        column = at - self._text.rfind("\n", 0, at)
        return UserError(f"{self._name}:{line}: not valid JSON: {what} at column {column}")


def _is_list_line(text: str, position: int) -> bool:
    """Whether the text is lines of JSON lists, rather than one array of rows."""
    first, _, rest = text[position:].partition("\n")
    try:
        return bool(rest.strip()) and isinstance(from_json(first), list)
    except RowError:
        return False


def _skip(text: str, position: int) -> int:
    found = re.compile(r"[ \t\r\n]*").match(text, position)
    return found.end() if found else position


def _table(stream: IO[bytes], out: IO[bytes], name: str, numbers: Collection[str]) -> None:
    """CSV: the first line names the columns; every value is text, but those of the columns
    `numbers`. A row keeps the number of its first line.
    """
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if kind_of(Path(name)) == ".tsv" else ","
    reader = csv.reader(_lines_of_text(stream, name), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    before = 0
    try:
        for values in reader:
            line = b""
            if header is None:
                header = values
                _refuse_doubles(header, name)
            elif values:
                line = _line_of_table(header, values, numbers)
            # Where values span lines, blank lines keep the numbering.
            out.write(line + b"\n" * (reader.line_num - before))
            before = reader.line_num
    except csv.Error as error:
        raise UserError(f"{name}:{before + 1}: not valid CSV: {error}") from None


def _lines_of_text(stream: IO[bytes], name: str) -> Iterator[str]:
    for number, raw in enumerate(stream, 1):
        yield _decoded(raw, name, number)


def _refuse_doubles(header: list[str], name: str) -> None:
    for column in header:
        if column and header.count(column) > 1:
            raise UserError(f"{name}:1: two columns are called {column!r}")


def _line_of_table(header: list[str], values: list[str], numbers: Collection[str]) -> bytes:
    """The values of a row as a line of JSON."""
    if len(values) != len(header):
        found = f"{len(values)} values where the first line names {len(header)} columns"
        return ERROR_MARK + found.encode()
    row: dict[str, float | str | None] = {}
    for column, value in zip(header, values, strict=True):
        row[column] = _number(value) if column in numbers else value
    return dump(row)


def _number(text: str) -> float | str | None:
    """The number that a text of CSV is; None if it is empty, the text if it is something else."""
    try:
        return float(text) if text.strip() else None
    except ValueError:
        return text


def _arrow(stream: IO[bytes], out: IO[bytes], name: str) -> None:
    """Parquet, and Arrow as a file or as a stream."""
    try:
        arrow, ipc, parquet = map(import_module, ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"))
    except ImportError:
        reason = "reading .parquet and .arrow needs one more package: pip install 'sftx[parquet]'"
        raise UserError(f"{name}: {reason}") from None
    kind = kind_of(Path(name))[1:].capitalize()
    stream = stream if stream.seekable() else io.BytesIO(stream.read())
    try:
        magic = stream.read(6)
        stream.seek(0)
        if kind == "Parquet":
            table = parquet.ParquetFile(stream)
            shape = shape_of(table.iter_batches(1024))
            batches: Any = table.iter_batches(1024)
        elif magic == b"ARROW1":
            file = ipc.open_file(stream)
            shape = shape_of(map(file.get_batch, range(file.num_record_batches)))
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            shape = shape_of(ipc.open_stream(stream))
            stream.seek(0)
            batches = ipc.open_stream(stream)
        for batch in batches:
            write_rows(batch.to_pylist(maps_as_pydicts="strict"), out, shape)
    except (arrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a readable {kind} file: {error}") from None


def write_rows(rows: Iterable[object], out: IO[bytes], shape: Shape | None) -> None:
    """Write rows that come from Arrow; `shape` tells which of their nulls somebody wrote."""
    out.writelines(dump(as_written(row, shape)) + b"\n" for row in rows)


_CONVERTERS: dict[str, Callable[[IO[bytes], IO[bytes], str], None]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".txt": _text,
    ".parquet": _arrow,
    ".arrow": _arrow,
}
