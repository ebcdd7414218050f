"""The token cache: one safetensors file per block of rows, named by everything its tokens depend
on.

A file appears whole or not at all (temporary name, fsync, rename), so processes may share a cache
and a killed one leaves nothing that looks finished. Every example carries a hash of its tokens and
weights, checked when it is read; all else in a file is under a hash that is checked when it is
opened. A file that fails is as if it were not there.

Whoever may not write the cache can use what is in it.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftx.types import Example, UserError

VERSION = "4"  # raise when the same rows must be encoded anew: the layout here, or the parsing of rows, has changed
_DTYPES = {
    "I64": np.int64,
    "U64": np.uint64,
    "F64": np.float64,
    "I32": np.int32,
    "F32": np.float32,
    "U8": np.uint8,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclass(slots=True, eq=False)
class TokenBlock:
    """The encoded rows of one block: N examples laid end to end, with what happened to each.

    `weights` is uint8 where every weight is 0 or 1. `line` counts from the first line of the block.
    `cut_tokens` and `cut_targets` (what truncation took) stand at the first example of a row and
    are 0 elsewhere.
    """

    ids: NDArray[np.int32]  # [T]
    weights: NDArray[Any]  # [T] uint8 or float32
    starts: NDArray[np.int64]  # [N + 1]
    line: NDArray[np.int32]  # [N]
    part: NDArray[np.int32]  # [N]
    note: NDArray[np.int32]  # [N] index into meta["notes"]: what was done to the example
    about: NDArray[np.int32]  # [N] index into meta["abouts"]: what was done to its row
    split: NDArray[np.uint8]  # [N] 1 where the row was cut into pieces because it was too long
    shortened: NDArray[
        np.uint8
    ]  # [N] 1 where something of the prompt is gone because the row was too long
    cut_tokens: NDArray[np.int32]  # [N]
    cut_targets: NDArray[np.int32]  # [N]
    targets: NDArray[np.int32]  # [N] tokens with weight
    sums: NDArray[np.float64]  # [N] sum of weights
    digest: NDArray[np.uint64]  # [N] hash of tokens and weights
    row: NDArray[np.uint64]  # [N] hash of the row as it stood in the file
    meta: dict[str, Any] = field(default_factory=dict)
    """`notes`, `abouts`, `largest_id`; `dropped` and `bad`: [line, reason] of each row. Also how
    many rows have each column that is not read (`unused`), each column of `data.columns`
    (`renamed`), and each remark made while they were read (`noted`).
    """

    def example(self, index: int) -> Example:
        """Example `index`, its ids a view.

        Raises:
            UserError: the tokens are not those that were written.
        """
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        ids, weights = self.ids[start:stop], self.weights[start:stop].astype(np.float32, copy=False)
        if example_digest(ids, weights) != int(self.digest[index]):
            raise UserError(
                "a file of the token cache is damaged; delete the cache folder and start again"
            )
        note, part, shortened = self.note[index], self.part[index], self.shortened[index]
        return Example(ids, weights, self.meta["notes"][int(note)], int(part), bool(shortened))


def example_digest(ids: NDArray[np.int32], weights: NDArray[np.float32]) -> int:
    """64-bit hash of one example's tokens and weights."""
    content = blake2b(ids.data if len(ids) else b"", digest_size=8)
    content.update(weights.data if len(weights) else b"")
    return int.from_bytes(content.digest(), "little")


class Entry(NamedTuple):
    """One example on its way into a block, with what happened to its row."""

    example: Example
    line: int  # from the first line of the block
    row: int = 0
    split: bool = False
    cut_tokens: int = 0
    cut_targets: int = 0
    about: tuple[str, ...] = ()


def make_block(entries: Sequence[Entry], meta: dict[str, Any]) -> TokenBlock:
    """Lay examples end to end. `meta` may hold all that `TokenBlock.meta` does but `largest_id`."""
    examples = [entry.example for entry in entries]
    weights = np.concatenate([e.weights for e in examples] or [np.zeros(0, np.float32)]).astype(
        np.float32, copy=False
    )
    starts = np.concatenate([[0], np.cumsum([len(e.ids) for e in examples])]).astype(np.int64)
    targets = np.diff(np.concatenate([[0], np.cumsum(weights != 0)])[starts]).astype(np.int32)
    plain = bool(((weights == 0) | (weights == 1)).all())
    notes: dict[str, int] = {}
    abouts: dict[tuple[str, ...], int] = {}
    for entry in entries:
        notes.setdefault(entry.example.note, len(notes))
        abouts.setdefault(entry.about, len(abouts))

    def first(values: list[int]) -> NDArray[np.int32]:
        return np.array(
            [v if e.part == 0 else 0 for v, e in zip(values, examples, strict=True)], np.int32
        )

    ids = np.concatenate([e.ids for e in examples] or [np.zeros(0, np.int32)]).astype(
        np.int32, copy=False
    )
    nothing = {"dropped": [], "bad": [], "unused": {}, "noted": {}, "renamed": {}}
    facts = {**nothing, **meta, "notes": list(notes), "abouts": list(abouts)}
    return TokenBlock(
        ids=ids,
        weights=weights.astype(np.uint8) if plain else weights,
        starts=starts,
        line=np.array([entry.line for entry in entries], np.int32),
        part=np.array([e.part for e in examples], np.int32),
        note=np.array([notes[e.note] for e in examples], np.int32),
        about=np.array([abouts[entry.about] for entry in entries], np.int32),
        split=np.array([entry.split for entry in entries], np.uint8),
        shortened=np.array([e.shortened for e in examples], np.uint8),
        cut_tokens=first([entry.cut_tokens for entry in entries]),
        cut_targets=first([entry.cut_targets for entry in entries]),
        targets=targets,
        sums=targets.astype(np.float64)
        if plain
        else np.array([e.weights.sum(dtype=np.float64) for e in examples]),
        digest=np.array([example_digest(e.ids, e.weights) for e in examples], np.uint64),
        row=np.array([entry.row for entry in entries], np.uint64),
        meta={**facts, "largest_id": int(ids.max(initial=-1))},
    )


class Cache:
    """A folder of encoded blocks. The default is $SFTX_CACHE, else ~/.cache/sftx."""

    def __init__(self, folder: str | None = None) -> None:
        chosen = folder or os.environ.get("SFTX_CACHE") or "~/.cache/sftx"
        self.folder = Path(chosen).expanduser()
        self.writable = True
        try:
            (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder / "tmp").close()
        except OSError as error:
            self.writable = False
            if not self.folder.is_dir():
                raise UserError(
                    f"{self.folder}: the token cache cannot be written here ({error}); set "
                    "data.cache"
                ) from None

    def path(self, key: str, suffix: str = ".safetensors") -> Path:
        """Where the block (or, with another suffix, the note about a file) called `key` lives."""
        return self.folder / key[:2] / (key + suffix)

    def load(self, key: str) -> TokenBlock | None:
        """The block `key`, mapped into memory; None if it is absent or its file is not whole."""
        return open_block(self.path(key))

    def save(self, key: str, block: TokenBlock) -> None:
        """Write a block: it appears under its name whole, and survives a crash of the machine from
        then on.
        """
        arrays = {f.name: getattr(block, f.name) for f in fields(TokenBlock) if f.name != "meta"}
        about = {"sftx": json.dumps(block.meta), "columns": _digest_of_columns(arrays)}
        header: dict[str, Any] = {"__metadata__": about}
        end = 0
        for name, array in sorted(
            arrays.items(), key=lambda item: -item[1].itemsize
        ):  # keeps every array aligned
            end += array.nbytes
            span = [end - array.nbytes, end]
            header[name] = {
                "dtype": _NAMES[array.dtype],
                "shape": list(array.shape),
                "data_offsets": span,
            }
        about["header"] = _digest(json.dumps(header))
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        ordered = [
            np.ascontiguousarray(arrays[name]).tobytes()
            for name in header
            if name != "__metadata__"
        ]
        self.write(self.path(key), b"".join([struct.pack("<Q", len(text)), text, *ordered]))

    def write(self, path: Path, content: bytes) -> None:
        """Put `content` at `path`, whole or not at all."""
        temporary = None
        try:
            path.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder / "tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            raise UserError(
                f"{path}: the token cache cannot be written ({error}); set data.cache"
            ) from None

    def write_note(self, path: Path, value: Any) -> None:
        """Put a JSON value at `path` with its hash; nothing where the cache may not be written."""
        if self.writable:
            text = json.dumps(value)
            self.write(path, f"{_digest(text)} {text}".encode())

    def read_note(self, path: Path) -> Any:
        """What `write_note` wrote; None if nothing is there, or something else."""
        try:
            digest, _, text = path.read_text(encoding="utf-8").partition(" ")
        except (OSError, UnicodeDecodeError):
            return None
        return json.loads(text) if digest == _digest(text) else None

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """The first process of those that call the same `name` goes on; the others wait until it is
        done.

        So the ranks of a node encode their data once. The rest then goes on at the same time.
        """
        if not self.writable:  # what is not there cannot be made: nobody has to wait for it
            yield
            return
        path = self.path(blake2b(name.encode(), digest_size=20).hexdigest(), ".lock")
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(file, fcntl.LOCK_SH)
            yield

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for files that live as long as the block of code; what killed processes left
        long ago goes too.
        """
        if not self.writable:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)
            return
        tmp = self.folder / "tmp"
        for entry in os.scandir(tmp):
            try:
                if entry.stat().st_mtime < time.time() - 3 * 86400:
                    shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
            except (FileNotFoundError, PermissionError):
                continue  # another process was first, or it is another user's
        with tempfile.TemporaryDirectory(dir=tmp) as folder:
            yield Path(folder)


def open_block(path: Path) -> TokenBlock | None:
    """The block in a file, mapped into memory; None if the file is absent, cut off, damaged or not
    a block.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 16:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, PermissionError):
        return None
    length = struct.unpack("<Q", mapped[:8])[0]
    try:
        header = json.loads(mapped[8 : 8 + length]) if length < size else None
    except ValueError:
        return None
    about = _about(header)
    if header is None or about is None:
        return None
    arrays: dict[str, Any] = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if 8 + length + stop > size:
            return None
        dtype = _DTYPES[entry["dtype"]]
        arrays[name] = np.frombuffer(
            mapped, dtype, (stop - start) // np.dtype(dtype).itemsize, 8 + length + start
        )
    if about["columns"] != _digest_of_columns(arrays):
        return None
    return TokenBlock(**arrays, meta=json.loads(about["sftx"]))


def _about(header: Any) -> dict[str, str] | None:
    """What a header says beside its arrays, taken out of it; None if it is not as it was written."""
    about = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(about, dict):
        return None
    written = about.pop("header", None)
    if written != _digest(json.dumps(header)):
        return None
    return header.pop("__metadata__")


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _digest_of_columns(arrays: dict[str, NDArray[Any]]) -> str:
    """Hash of all arrays but tokens and weights, which are under the hashes of their examples."""
    content = blake2b(digest_size=16)
    for name in sorted(arrays.keys() - {"ids", "weights"}):
        content.update(np.ascontiguousarray(arrays[name]).tobytes())
    return content.hexdigest()
