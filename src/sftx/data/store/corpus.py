"""A corpus: encoded examples in order, mapped from the cache, with where each came from and where
every row went.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sftx.data.rotation import Rotation
from sftx.data.store.cache import TokenBlock, make_block, open_block
from sftx.types import ONE_EACH, Example, Int32, Ledger, UserError

OPEN_BLOCKS = 64  # mapped at once; each holds a file descriptor


@dataclass(frozen=True, slots=True)
class Origin:
    """A file of rows, as messages name it. `unit` says what its numbers count; `names` holds one
    file per row.
    """

    name: str
    unit: str = "line"
    names: tuple[str, ...] = ()

    def place(self, line: int) -> str:
        """`file:line`, or `file, row n` where rows are not lines."""
        if 0 < line <= len(self.names):
            return self.names[line - 1]
        return f"{self.name}:{line}" if self.unit == "line" else f"{self.name}, row {line}"


@dataclass(frozen=True, slots=True)
class Part:
    """One encoded block in its place: from which source and file, and the number of its first line."""

    block: Path | TokenBlock
    source: int
    origin: int
    line: int


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that gave no example. `bad` if the row itself is wrong."""

    source: int
    origin: int
    line: int
    reason: str
    bad: bool


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What is known of every example without reading its tokens; each field is an array of N."""

    lengths: Int32
    weights: NDArray[np.float64]
    targets: Int32
    source: NDArray[np.int16]
    origin: Int32
    line: NDArray[np.int64]
    part: Int32
    split: NDArray[np.uint8]
    shortened: NDArray[np.uint8]
    cut_tokens: Int32
    cut_targets: Int32
    digest: NDArray[np.uint64]
    row: NDArray[np.uint64]
    about: Int32
    block: Int32
    index: Int32

    def take(self, indices: NDArray[np.intp]) -> Columns:
        """The columns of some examples, in the order given."""
        return Columns(*(getattr(self, name)[indices] for name in self.__slots__))


class Corpus:
    """Examples that can be indexed, larger than memory if need be.

    Attributes:
        lengths: int32[N], tokens of each example.
        weights: float64[N], sum of the weights of each example.
        targets: int32[N], tokens of each example that carry weight.
        source: int16[N], index into `sources`.
        line: int64[N], 1-based line (or row) in the file; `place` names the file too.
        part: int32[N], number of the example among those of its row.
        columns: all that is known of the examples without reading tokens.
        sources: names of the sources.
        ledgers: where every row of each source went.
        largest_id: largest token id of all (-1 if there is none).
        renamed: how many rows have each of the columns that `data.columns` names anew.
        rotations: examples of which each epoch shows another share; all others are in every epoch.
    """

    def __init__(
        self, parts: Sequence[Part], sources: Sequence[str], origins: Sequence[Origin]
    ) -> None:
        self.sources, self.origins = list(sources), list(origins)
        self._parts = list(parts) or [
            Part(make_block([], {}), 0, 0, 0)
        ]  # so that arrays of nothing have their dtypes
        self._open = lru_cache(OPEN_BLOCKS)(self._load)
        self.largest_id = -1
        self.renamed: Counter[str] = Counter()
        columns, self.drops, self._notes = self._collect()
        self._use(columns)
        self.ledgers = self._ledgers(self.drops, self._notes)

    def __len__(self) -> int:
        return len(self.columns.lengths)

    def _use(self, columns: Columns) -> None:
        self.columns = columns
        self.rotations: tuple[Rotation, ...] = ()
        self.lengths, self.weights, self.targets = columns.lengths, columns.weights, columns.targets
        self.source, self.line, self.part = columns.source, columns.line, columns.part

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens and weights, in order, and of what an epoch shows of them."""
        states = [rotation.state() for rotation in self.rotations]
        return blake2b(
            b"".join([self.columns.digest.tobytes(), *states]), digest_size=16
        ).hexdigest()

    @property
    def ledger(self) -> Ledger:
        """Where every row went, over all sources."""
        whole = Ledger()
        for ledger in self.ledgers.values():
            whole.add(ledger)
        return whole

    def example(self, index: int) -> Example:
        """Example `index`; its ids are a view of the cache.

        Raises:
            UserError: the cache was damaged after it was written.
        """
        return self._open(int(self.columns.block[index])).example(int(self.columns.index[index]))

    def place(self, index: int) -> str:
        """`file:line` of the row that example `index` came from."""
        return self.origins[int(self.columns.origin[index])].place(int(self.columns.line[index]))

    def subset(self, indices: ArrayLike) -> Corpus:
        """The examples at `indices`, in that order, repeats allowed. The ledgers stay those of the
        whole.
        """
        chosen = copy(self)
        chosen.__dict__.pop("fingerprint", None)  # cached, and of other examples
        chosen._use(self.columns.take(np.asarray(indices, np.intp)))
        return chosen

    def count_shown(self, shown: NDArray[np.bool_]) -> None:
        """Write into the ledgers how many different rows a run shows, of whose examples it shows
        those in `shown`.
        """
        columns = self.columns
        rows = columns.origin.astype(np.int64) << 40 | columns.line
        for number, name in enumerate(self.sources):
            mine = (columns.source == number) & shown
            self.ledgers[name].shown = len(np.unique(rows[mine]))

    def divide(self, held_out: NDArray[np.bool_]) -> tuple[Corpus, Corpus]:
        """(the others, those held out), each with a ledger of its own. Dropped rows stay with the
        first.
        """
        rest, held = self.subset(np.flatnonzero(~held_out)), self.subset(np.flatnonzero(held_out))
        rest.ledgers = rest._ledgers(self.drops, self._notes)
        held.ledgers, held.drops = held._ledgers([], {}), []
        return rest, held

    def _load(self, index: int) -> TokenBlock:
        block = self._parts[index].block
        if isinstance(block, TokenBlock):
            return block
        opened = open_block(block)
        if opened is None:
            raise UserError(
                f"{block}: this file of the token cache is gone or damaged; start again to make "
                "it anew"
            )
        return opened

    def _collect(self) -> tuple[Columns, list[Drop], dict[int, Counter[str]]]:
        """Columns of all examples, dropped rows in the order of the data, and per source the counts
        of notes.
        """
        columns: dict[str, list[Any]] = {name: [] for name in Columns.__slots__}
        drops: list[Drop] = []
        notes: dict[int, Counter[str]] = defaultdict(Counter)
        codes: dict[tuple[str, ...], int] = {}
        for number, part in enumerate(self._parts):
            block = self._load(number)  # not kept: a large corpus has more blocks than may be open
            count = len(block.line)
            about = [codes.setdefault(tuple(a), len(codes)) for a in block.meta["abouts"]]
            self.largest_id = max(self.largest_id, block.meta["largest_id"])
            given = {
                "lengths": np.diff(block.starts).astype(np.int32),
                "weights": np.array(
                    block.sums
                ),  # a copy, as of all others: a view would keep the file mapped
                "source": np.full(count, part.source, np.int16),
                "origin": np.full(count, part.origin, np.int32),
                "line": block.line + np.int64(part.line),
                "about": np.array(about or [0], np.int32)[block.about],
                "block": np.full(count, number, np.int32),
                "index": np.arange(count, dtype=np.int32),
            }
            for name, arrays in columns.items():
                arrays.append(given[name] if name in given else np.array(getattr(block, name)))
            here = [(*row, False) for row in block.meta["dropped"]] + [
                (*row, True) for row in block.meta["bad"]
            ]
            drops += [
                Drop(part.source, part.origin, part.line + at, why, bad)
                for at, why, bad in sorted(here)
            ]
            self.renamed.update(block.meta["renamed"])
            unread = {f"column {c!r} not used": rows for c, rows in block.meta["unused"].items()}
            notes[part.source].update(unread | block.meta["noted"])
        self._abouts = list(codes)
        return (
            Columns(**{name: np.concatenate(arrays) for name, arrays in columns.items()}),
            drops,
            notes,
        )

    def _repeated(self, mine: NDArray[np.bool_]) -> int:
        """Tokens of rows that give a sequence for each turn, beyond the longest sequence of each
        row.
        """
        several = np.array([ONE_EACH in about for about in self._abouts], np.bool_)
        chosen = np.flatnonzero(mine & several[self.columns.about])
        if not len(chosen):
            return 0
        starts = np.flatnonzero(self.columns.part[chosen] == 0)
        lengths = self.columns.lengths[chosen].astype(np.int64)
        return int(lengths.sum() - np.maximum.reduceat(lengths, starts).sum())

    def _ledgers(self, drops: list[Drop], notes: dict[int, Counter[str]]) -> dict[str, Ledger]:
        """The ledger of each source. `notes` counts what is not known by example: fields that are
        not read.
        """
        columns, ledgers = self.columns, {}
        for number, name in enumerate(self.sources):
            mine = columns.source == number
            first = mine & (columns.part == 0)
            dropped = [drop for drop in drops if drop.source == number]
            split = int((first & (columns.split != 0)).sum())
            rows = int(first.sum())
            counts = Counter(notes.get(number))
            found = np.bincount(columns.about[first], minlength=len(self._abouts)).tolist()
            for about, times in zip(self._abouts, found, strict=True):
                counts.update(dict.fromkeys(about, times) if times else {})
            ledgers[name] = Ledger(
                read=rows + len(dropped),
                trained=rows - split,
                split=split,
                dropped=len(dropped),
                shown=rows,
                truncated=int((columns.cut_tokens[first] > 0).sum()),
                examples=int(mine.sum()),
                tokens=int(columns.lengths[mine].sum()),
                targets=int(columns.targets[mine].sum()),
                tokens_truncated=int(columns.cut_tokens[first].sum()),
                targets_truncated=int(columns.cut_targets[first].sum()),
                targets_shortened=int(columns.targets[mine & (columns.shortened != 0)].sum()),
                tokens_repeated=self._repeated(mine),
                notes=dict(counts),
            )
        return ledgers
