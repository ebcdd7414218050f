"""What stands at the beginning of a GGUF file: its metadata, and where its tensors lie.

A file is untrusted: every count and every place is checked against the size of the file before
anything is read or made.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

from sftx.types import UserError

Scalar: TypeAlias = int | float | str
Value: TypeAlias = Scalar | list[Scalar]

MOST_DIMENSIONS = 4
_STRING = 8
_ARRAY = 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS[12] = "d"
_LEAST_ENTRY = 13  # bytes of the smallest metadata: an empty key, its type, a byte
_LEAST_TENSOR = 24  # bytes of the smallest tensor entry


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `shape` as torch counts (rows first), `kind` the number of its ggml type,
    `start` and `size` in bytes of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata of a GGUF file by key, and its tensors by name."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorEntry]


def read_header(path: Path) -> Header:
    """The header of the GGUF file at `path`; no tensor is read.

    Raises:
        UserError: it is no GGUF file, it is damaged, or it holds tensors of an unknown type.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file (it does not begin with GGUF)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _Cursor(path, content).header()
            except (struct.error, UnicodeDecodeError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: this GGUF file is damaged: {what}; copy or download it again")


class _Cursor:
    """Reads one value after another, and never beyond the end of the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path = path
        self.content = content
        self.at = 4  # after the letters GGUF

    def header(self) -> Header:
        version = self._number("I")
        if version not in (2, 3):
            raise UserError(
                f"{self.path}: GGUF version {version} is not read (2 and 3 are); a file of a "
                "machine with another order of bytes gives such a number too"
            )
        tensor_count = self._count(_LEAST_TENSOR, "tensors")
        entry_count = self._count(_LEAST_ENTRY, "entries")
        metadata: dict[str, Value] = {}
        for _ in range(entry_count):
            key = self._text()
            if key in metadata:
                raise _damaged(self.path, f"{key} stands there twice")
            metadata[key] = self._value(int(self._number("I")))
        entries = [self._entry() for _ in range(tensor_count)]
        return Header(self.path, metadata, self._placed(entries, metadata))

    def _number(self, form: str) -> int | float:
        (value,) = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def _count(self, least_bytes: int, of_what: str) -> int:
        """A count of things that take at least so many bytes each."""
        count = int(self._number("Q"))
        left = len(self.content) - self.at
        if count * least_bytes > left:
            raise _damaged(self.path, f"it counts {count:,} {of_what}, and has {left:,} bytes left")
        return count

    def _text(self) -> str:
        length = self._count(1, "letters of a text")
        text = self.content[self.at : self.at + length].decode("utf-8")
        self.at += length
        return text

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._text()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise _damaged(self.path, f"no metadata is of type {kind}")
        inner = int(self._number("I"))
        if inner == _STRING:
            return [self._text() for _ in range(self._count(8, "texts"))]
        if inner not in _NUMBERS:
            raise _damaged(self.path, f"no list holds values of type {inner}")
        form = _NUMBERS[inner]
        count = self._count(struct.calcsize(form), "numbers")
        values = struct.unpack_from(f"<{count}{form}", self.content, self.at)
        self.at += struct.calcsize(f"<{count}{form}")
        return list(values)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name = self._text()
        dimensions = int(self._number("I"))
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _damaged(self.path, f"{name} has {dimensions:,} dimensions")
        shape = struct.unpack_from(f"<{dimensions}Q", self.content, self.at)
        self.at += 8 * dimensions
        kind = int(self._number("I"))
        return name, tuple(reversed(shape)), kind, int(self._number("Q"))

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Value]
    ) -> dict[str, TensorEntry]:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _damaged(self.path, f"general.alignment is {alignment!r}")
        begin = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, shape, kind, offset in entries:
            size = _size(self.path, name, shape, kind)
            start = begin + offset
            if name in tensors:
                raise _damaged(self.path, f"the tensor {name} stands there twice")
            if start + size > len(self.content):
                raise _damaged(self.path, f"the tensor {name} reaches beyond the end of the file")
            tensors[name] = TensorEntry(name, shape, kind, start, size)
        return tensors


def _size(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor of that ggml type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in {known.value for known in GGML_QUANT_SIZES}:
        raise UserError(f"{path}: the tensor {name} is of type {kind}, which sftx does not know")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % block:
        raise _damaged(path, f"rows of {name} have {shape[-1]:,} values, no multiple of {block}")
    return prod(shape) // block * block_bytes
