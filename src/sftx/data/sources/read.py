"""From a path to raw rows: finding files, cutting JSON lines into blocks that name themselves by
content, parsing them.

A JSONL file is read where it lies; `convert` turns every other format into JSON lines first. JSON
is parsed by the standard library, which changes no value.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from sftx.data.sources.validate import from_json
from sftx.types import Json, RowError, UserError

CHUNK = 4 << 20
MIN_BLOCK, MAX_BLOCK = 1 << 20, 4 << 20
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
PACKED = ("", ".gz", ".zst")
_KINDS = f"{', '.join(SUFFIXES)}, also .gz and .zst of them"
BESIDE_ROWS = re.compile(
    r"(dataset_info|state|dataset_dict)\.json|cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow"
)
ERROR_MARK = b"\0unreadable: "
"""What a converted line begins with that stands for an unreadable row; no JSON value begins so."""


class Block(NamedTuple):
    """Consecutive lines of a file: bytes `start:stop`, the first being line number `line`
    (1-based).

    Blocks end where a hash of line lengths says so, not at fixed offsets: rows added or removed
    change the blocks they touch and leave the others, and so what was encoded for them, as they
    were.
    """

    start: int
    stop: int
    line: int
    lines: int
    digest: str  # of the bytes


def find_files(path: str) -> list[Path]:
    """The data files a path, glob or folder stands for, sorted by name.

    A .txt file is one document. In a folder that holds other data, it is taken for a note and left
    out.

    Raises:
        UserError: nothing is there, or what is there is not a data file.
    """
    target = Path(path).expanduser()
    if target.is_file():
        if _is_data(target):
            return [target]
        raise UserError(f"{path}: unknown kind of file; expected {_KINDS}")
    if target.is_dir():
        return _files_of_folder(target, path)
    if glob.has_magic(path):
        paths = map(Path, sorted(glob.glob(str(target), recursive=True)))
        if files := [file for file in paths if file.is_file() and _is_data(file)]:
            return files
        raise UserError(f"{path}: no data file matches this pattern")
    raise UserError(f"{path}: no such file or folder{_like(target)}")


def _like(target: Path) -> str:
    """A hint if a file of almost this name is there; else ""."""
    if not target.parent.is_dir():
        return ""
    names = [file.name for file in target.parent.iterdir()]
    close = difflib.get_close_matches(target.name, names, 1)
    return f"; did you mean {target.with_name(close[0])}?" if close else ""


def _files_of_folder(target: Path, path: str) -> list[Path]:
    """The data files in a folder, which messages call `path`."""
    found: list[Path] = []
    for file in sorted(target.rglob("*")):
        if file.is_file() and _is_data(file) and not _is_beside(file, target):
            found.append(file)
    _refuse_links_out(found, target, path)
    if not found:
        raise UserError(f"{path}: the folder holds no data file ({_KINDS})")
    return [file for file in found if kind_of(file) != ".txt"] or found


def _refuse_links_out(files: list[Path], folder: Path, path: str) -> None:
    """`UserError` for a link to a file outside of the folder, whose files may come from strangers.
    Only the hub's cache links out of its folders, to its own blobs.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise UserError(
                f"{file}: a link to a file outside of {path}; name that file itself in data.train"
            )


def _is_beside(file: Path, folder: Path) -> bool:
    """Whether a file in a folder is no part of its data: hidden, or one that `datasets` puts beside
    saved rows.
    """
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return hidden or bool(BESIDE_ROWS.fullmatch(file.name))


def is_hub_name(path: str) -> bool:
    """Whether `path` can only be the name of a data set on the hub: `owner/name[/config][:split]`,
    nothing local.
    """
    local = Path(path).expanduser()
    shape = re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.\[\]%:-]+)?", path)
    is_local = local.exists() or _is_data(local) or Path(path.split("/")[0]).exists()
    return bool(shape) and not is_local


def kind_of(file: Path) -> str:
    """The format of a file by its name, compressed or not: `.jsonl`, `.csv`, ..."""
    name = file.name.lower()
    for packed in PACKED[1:]:
        name = name.removesuffix(packed)
    kind = Path(name).suffix
    return ".jsonl" if kind == ".ndjson" else kind


def _is_data(file: Path) -> bool:
    return file.name.lower().endswith(tuple(s + p for s in SUFFIXES for p in PACKED))


def is_lines(file: Path) -> bool:
    """Whether a file is JSONL as it stands, and so is read in place."""
    return kind_of(file) == ".jsonl" and not file.name.lower().endswith(PACKED[1:])


def scan(stream: IO[bytes], name: str) -> Iterator[Block]:
    """Cut JSON lines into blocks, reading once, front to back.

    A block ends at the first mark past its least size, or at the first line past its greatest.
    """
    head = stream.read(4)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name}: the file is UTF-16; save it as UTF-8")
    offset = start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    stream.seek(offset)
    line = 1
    lines = 0
    last_end = offset
    last_length = 0
    content = blake2b(digest_size=20)
    while chunk := stream.read(CHUNK):
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + (offset + 1)
        lengths = np.diff(ends, prepend=last_end)
        before = np.concatenate([[last_length], lengths[:-1]]) if len(ends) else lengths
        marks = ends[(lengths * 2654435761 + before * 40503) % 1021 == 0]
        position = 0
        while cuts := [
            *marks[marks >= start + MIN_BLOCK][:1],
            *ends[ends >= start + MAX_BLOCK][:1],
        ]:
            stop = int(min(cuts))
            content.update(chunk[position : stop - offset])
            upto = lines + int(np.searchsorted(ends, stop, "right"))
            yield Block(start, stop, line, upto - line + 1, content.hexdigest())
            start = stop
            line = upto + 1
            content = blake2b(digest_size=20)
            position = stop - offset
        content.update(chunk[position:])
        lines += len(ends)
        offset += len(chunk)
        if len(ends):
            last_end = int(ends[-1])
            last_length = int(lengths[-1])
    if offset > start:
        yield Block(
            start, offset, line, lines - line + 1 + (last_end < offset), content.hexdigest()
        )


def rows_in(data: bytes, line: int) -> Iterator[tuple[int, bytes, Json | RowError]]:
    """(line number, the line, its parsed value or what is wrong with it) of a block's lines; blank
    lines only count.
    """
    for number, raw in enumerate(data.split(b"\n"), line):
        if raw and not raw.isspace():
            yield number, raw, parse_line(raw)


def parse_line(raw: bytes) -> Json | RowError:
    """One line of JSON, or the error that says where in the line it stops being JSON."""
    if raw.startswith(ERROR_MARK):
        return RowError(raw.removeprefix(ERROR_MARK).decode("utf-8", "replace"))
    try:
        return from_json(str(raw, "utf-8"))
    except UnicodeDecodeError as error:
        return RowError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}; save the file "
            "as UTF-8"
        )
    except RowError as error:
        return error
