"""A block: the encoded examples of consecutive rows, in memory and as one file.

All that is known of an example without its tokens is one entry of a table. A file holds five arrays
in numpy's own format (.npy), one behind the other: the table, the ids, the weights, the kinds, and
what is known of the rows. `numpy.load` reads them in this order.

Every example carries a hash of its tokens and weights, checked when it is read. All else in a file
is under a hash that is checked when it is opened.
"""

from __future__ import annotations

import io
import json
import mmap
import tokenize
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from sftx.data.encoder import Encoded
from sftx.types import KINDS, Example, Float32, Int32, UInt8, UserError

EXAMPLE = np.dtype(
    [
        ("weight", np.float64),  # sum of its weights
        ("line", np.int64),  # of its row: in a block counted from 0, in a corpus from 1
        ("start", np.int64),  # where its tokens begin in the block
        ("digest", np.uint64),  # hash of its tokens and weights
        ("row", np.uint64),  # hash of its row as it stood in the file
        ("length", np.int32),  # tokens
        ("targets", np.int32),  # tokens with weight
        ("part", np.int32),  # its number among the examples of its row
        ("note", np.int32),  # index into `Facts.notes`
        ("about", np.int32),  # index into `Facts.abouts`, or of a corpus
        # What truncation took from the row: at its first example; 0 at the others.
        ("cut_tokens", np.int32),
        ("cut_targets", np.int32),
        ("origin", np.int32),  # the file; known to a corpus, as are the next two
        ("block", np.int32),
        ("source", np.int16),
        ("split", np.bool_),  # the row was too long, and cut in pieces
        ("shortened", np.bool_),  # the row was too long, and some of its prompt is gone
    ]
)
"""What is known of an example without its tokens."""
COUNT = np.dtype([("tokens", np.int32), ("targets", np.int32), ("weight", np.float64)])
BY_KIND = np.dtype([*EXAMPLE.descr, ("kinds", COUNT, (len(KINDS),))])
"""The same with what there is of each kind of text, where the kinds are told apart."""
Table = NDArray[np.void]
Weights = UInt8 | Float32
_HASH = 16  # bytes


@dataclass
class Facts:
    """What is known of the rows of a block beside their examples."""

    notes: list[str] = field(default_factory=list[str])
    """What was done to examples."""
    abouts: list[list[str]] = field(default_factory=list[list[str]])
    """What was done to rows."""
    dropped: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """(line, reason) of rows that the settings drop."""
    bad: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """(line, reason) of rows that are wrong."""
    unused: Counter[str] = field(default_factory=Counter[str])
    """How many rows have each column that is not read."""
    renamed: Counter[str] = field(default_factory=Counter[str])
    """How many rows have each column of `data.columns`."""
    noted: Counter[str] = field(default_factory=Counter[str])
    """How many rows have each remark that was made while they were read."""
    largest_id: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The encoded rows of one block: its examples' tokens laid end to end.

    `weights` is uint8 where every weight is 0 or 1, else float32. `kinds` is empty where kinds of
    text are not told apart.
    """

    table: Table
    ids: Int32
    weights: Weights
    facts: Facts
    kinds: UInt8

    def example(self, entry: np.void) -> Example:
        """The example with this entry in the table, its ids a view.

        Raises:
            UserError: the tokens are not those that were written.
        """
        begin = int(entry["start"])
        end = begin + int(entry["length"])
        ids = self.ids[begin:end]
        weights = self.weights[begin:end].astype(np.float32, copy=False)
        kinds = None
        if len(self.kinds):
            kinds = self.kinds[begin:end]
        digest = example_digest(ids, weights, kinds)
        if digest != int(entry["digest"]):
            raise UserError(
                "a file of the token cache is damaged; delete the cache folder and start again"
            )
        note = self.facts.notes[int(entry["note"])]
        part = int(entry["part"])
        shortened = bool(entry["shortened"])
        return Example(ids, weights, note, part, shortened, kinds)


def example_digest(ids: Int32, weights: Float32, kinds: UInt8 | None = None) -> int:
    """64-bit hash of one example's tokens and weights, and of their kinds where these are known."""
    content = blake2b(digest_size=8)
    content.update(ids.tobytes())
    content.update(weights.tobytes())
    if kinds is not None:
        content.update(kinds.tobytes())
    return int.from_bytes(content.digest(), "little")


def make_block(rows: Sequence[tuple[int, int, Encoded]], facts: Facts | None = None) -> Block:
    """Lay the examples of rows end to end.

    A row is its line (counted from the first of the block), its hash, and what became of it.
    """
    facts = facts or Facts()
    examples: list[Example] = []
    for _, _, encoded in rows:
        examples += encoded.examples
    ids: list[Int32] = [np.zeros(0, np.int32)]
    weights: list[Float32] = [np.zeros(0, np.float32)]
    kinds: list[UInt8] = [np.zeros(0, np.uint8)]
    dtype = EXAMPLE
    for example in examples:
        ids.append(example.ids)
        weights.append(example.weights)
        if example.kinds is not None:
            kinds.append(example.kinds)
            dtype = BY_KIND
    table = _table_of(examples, facts, dtype)
    _add_rows(table, rows, facts)
    all_ids = np.concatenate(ids)
    facts.largest_id = int(all_ids.max(initial=-1))
    all_weights = _small(np.concatenate(weights))
    return Block(table, all_ids, all_weights, facts, np.concatenate(kinds))


def _small(weights: Float32) -> Weights:
    """Weights as a block keeps them: in a byte each where all are 0 or 1."""
    is_plain = (weights == 0) | (weights == 1)
    if is_plain.all():
        return weights.astype(np.uint8)
    return weights


def _add_rows(table: Table, rows: Sequence[tuple[int, int, Encoded]], facts: Facts) -> None:
    """Write what is known of each row into the entries of its examples."""
    abouts: dict[tuple[str, ...], int] = {}
    end = 0
    for line, digest, encoded in rows:
        begin = end
        end += len(encoded.examples)
        of_row = table[begin:end]
        of_row["line"] = line
        of_row["row"] = digest
        of_row["split"] = encoded.action == "split"
        of_row["about"] = abouts.setdefault(tuple(encoded.notes), len(abouts))
        of_row["cut_tokens"][:1] = encoded.tokens_truncated
        of_row["cut_targets"][:1] = encoded.targets_truncated
    facts.abouts = [list(about) for about in abouts]


def _table_of(examples: list[Example], facts: Facts, dtype: np.dtype[np.void]) -> Table:
    """All that the examples say of themselves; their notes go into `facts`."""
    table = np.zeros(len(examples), dtype)
    notes: dict[str, int] = {}
    for entry, example in zip(table, examples, strict=True):
        entry["length"] = len(example.ids)
        entry["targets"] = example.targets
        entry["weight"] = example.weights.sum(dtype=np.float64)
        entry["part"] = example.part
        entry["shortened"] = example.shortened
        entry["digest"] = example_digest(example.ids, example.weights, example.kinds)
        if example.kinds is not None:
            entry["kinds"] = _counts(example.kinds, example.weights)
        entry["note"] = notes.setdefault(example.note, len(notes))
    lengths = table["length"]
    table["start"] = np.cumsum(lengths) - lengths
    facts.notes = list(notes)
    return table


def _counts(kinds: UInt8, weights: Float32) -> NDArray[np.void]:
    """COUNT[kinds]: what an example has of each kind."""
    count = len(KINDS)
    found = np.zeros(count, COUNT)
    found["tokens"] = np.bincount(kinds, minlength=count)
    kinds_of_targets = kinds[weights != 0]
    found["targets"] = np.bincount(kinds_of_targets, minlength=count)
    found["weight"] = np.bincount(kinds, weights.astype(np.float64), count)
    return found


def block_bytes(block: Block) -> bytes:
    """The content of a block's file."""
    text = json.dumps(vars(block.facts)).encode()
    digest = _digest(block.table, block.ids, block.weights, text)
    said = np.frombuffer(digest + text, np.uint8)
    file = io.BytesIO()
    arrays = (block.table, block.ids, block.weights, block.kinds, said)
    for array in arrays:
        npy.write_array(file, array)
    return file.getvalue()


def open_block(path: Path) -> Block | None:
    """The block in a file, mapped into memory; None if the file is absent, cut off or damaged."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = _next_array(mapped)
        ids = _next_array(mapped)
        weights = _next_array(mapped)
        kinds = _next_array(mapped)
        said = _next_array(mapped).tobytes()
    except (FileNotFoundError, PermissionError):
        return None
    except (ValueError, OverflowError, SyntaxError, tokenize.TokenError):  # a damaged header
        return None
    if table.dtype not in (EXAMPLE, BY_KIND):
        return None
    digest = said[:_HASH]
    text = said[_HASH:]
    if digest != _digest(table, ids, weights, text):
        return None
    # The pages that were read to be checked go back; what is used of them is read again.
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED)
    facts = json.loads(text)
    for name in ("unused", "renamed", "noted"):
        facts[name] = Counter(facts[name])
    return Block(table, ids, weights, Facts(**facts), kinds)


def _next_array(mapped: mmap.mmap) -> NDArray[Any]:
    """The array in .npy format at the position of a file, which moves behind it."""
    npy.read_magic(mapped)
    shape, _, dtype = npy.read_array_header_1_0(mapped)
    begin = mapped.tell()
    array = np.frombuffer(mapped, dtype, shape[0], begin)
    mapped.seek(begin + array.nbytes)
    return array


def _digest(table: Table, ids: Int32, weights: Weights, text: bytes) -> bytes:
    """Hash of all but the tokens and weights, which are under the hashes of their examples."""
    content = blake2b(table.tobytes(), digest_size=_HASH)
    content.update(f"{ids.dtype} {ids.shape} {weights.dtype} {weights.shape}".encode())
    content.update(text)
    return content.digest()
