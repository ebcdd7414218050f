"""A corpus: encoded examples in order, mapped from the cache, with where each came from and where
every row went.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sftx.data.rotation import Rotation
from sftx.data.store.block import EXAMPLE, Block, Facts, Table, open_block
from sftx.types import KINDS, ONE_EACH, Bools, Example, Int32, KindCount, Ledger, UserError

OPEN_BLOCKS = 64  # mapped at once; each holds a file descriptor


@dataclass(frozen=True, slots=True)
class Origin:
    """A file of rows, as messages name it. `unit` says what its numbers count; `names` holds one
    file per row.
    """

    name: str
    unit: str = "line"
    names: tuple[str, ...] = ()
    form: str = ""

    def place(self, line: int) -> str:
        """`file:line`, or `file, row n` where rows are not lines."""
        if 0 < line <= len(self.names):
            return self.names[line - 1]
        if self.unit == "line":
            return f"{self.name}:{line}"
        return f"{self.name}, row {line}"


@dataclass(frozen=True, slots=True)
class Part:
    """One encoded block in its place: its source, its file, and the number of its first line."""

    block: Path | Block
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


class Corpus:
    """Examples that can be indexed, larger than memory if need be.

    Attributes:
        table: EXAMPLE[N], all that is known of the examples without reading tokens.
        lengths: int32[N], tokens of each example.
        weights: float64[N], sum of the weights of each example.
        targets: int32[N], tokens of each example that carry weight.
        source: int16[N], index into `sources`.
        line: int64[N], 1-based line (or row) in the file; `place` names the file too.
        part: int32[N], number of the example among those of its row.
        sources: names of the sources.
        ledgers: where every row of each source went.
        largest_id: largest token id of all (-1 if there is none).
        renamed: how many rows have each of the columns that `data.columns` names anew.
        rotations: examples of which each epoch shows another share; all others are in every epoch.
        fields: for each file, by line, a hash of the field that rows are grouped by; () if none is.
    """

    def __init__(
        self, parts: Sequence[Part], sources: Sequence[str], origins: Sequence[Origin]
    ) -> None:
        self.sources = list(sources)
        self.origins = list(origins)
        self.largest_id = -1
        self.renamed: Counter[str] = Counter()
        self.fields: tuple[NDArray[np.uint64], ...] = ()
        self.drops: list[Drop] = []
        self._parts = list(parts)
        self._open = lru_cache(OPEN_BLOCKS)(self._load)
        self._notes: list[Counter[str]] = [Counter() for _ in sources]
        self._abouts: dict[tuple[str, ...], int] = {}
        self._use(self._joined())
        self.ledgers = self._ledgers(self.drops, self._notes)

    def __len__(self) -> int:
        return len(self.table)

    def _use(self, table: Table) -> None:
        self.table = table
        self.rotations: tuple[Rotation, ...] = ()
        self.lengths = table["length"]
        self.weights = table["weight"]
        self.targets = table["targets"]
        self.source = table["source"]
        self.line = table["line"]
        self.part = table["part"]

    def _joined(self) -> Table:
        """The tables of all parts as one."""
        tables: list[Table] = []
        for number in range(len(self._parts)):
            table = self._collected(number)
            if len(table):
                tables.append(table)
        dtype = tables[0].dtype if tables else EXAMPLE
        end = sum(map(len, tables))
        whole = np.empty(end, dtype)
        while tables:  # each goes as soon as it is copied, so that all are never held twice
            table = tables.pop()
            begin = end - len(table)
            whole[begin:end] = table
            end = begin
        return whole

    def _collected(self, number: int) -> Table:
        """The table of a part, with its place in the data; the facts of its rows are added up."""
        part = self._parts[number]
        block = self._load(number)  # not kept: a large corpus has more blocks than may be open
        facts = block.facts
        self.largest_id = max(self.largest_id, facts.largest_id)
        self.renamed.update(facts.renamed)
        notes = self._notes[part.source]
        for column, rows in facts.unused.items():
            notes[f"column {column!r} not used"] += rows
        notes.update(facts.noted)
        self._add_drops(part, facts)
        table = block.table.copy()
        table["block"] = number
        table["source"] = part.source
        table["origin"] = part.origin
        table["line"] += part.line
        codes: list[int] = []
        for about in facts.abouts:
            code = self._abouts.setdefault(tuple(about), len(self._abouts))
            codes.append(code)
        if codes:
            table["about"] = np.array(codes)[table["about"]]
        return table

    def _add_drops(self, part: Part, facts: Facts) -> None:
        here = [(line, reason, False) for line, reason in facts.dropped]
        here += [(line, reason, True) for line, reason in facts.bad]
        for line, reason, bad in sorted(here):
            drop = Drop(part.source, part.origin, part.line + line, reason, bad)
            self.drops.append(drop)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens and weights, in order, and of what an epoch shows of them."""
        content = blake2b(self.table["digest"].tobytes(), digest_size=16)
        for rotation in self.rotations:
            content.update(rotation.state())
        return content.hexdigest()

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
        entry = self.table[index]
        block = self._open(int(entry["block"]))
        return block.example(entry)

    def place(self, index: int) -> str:
        """`file:line` of the row that example `index` came from."""
        entry = self.table[index]
        origin = self.origins[int(entry["origin"])]
        return origin.place(int(entry["line"]))

    def subset(self, indices: ArrayLike) -> Corpus:
        """The examples at `indices`, in that order, repeats allowed. The ledgers stay those of the
        whole.
        """
        chosen = copy(self)
        chosen.__dict__.pop("fingerprint", None)  # cached, and of other examples
        chosen._use(self.table[np.asarray(indices, np.intp)])
        return chosen

    def count_shown(self, shown: Bools) -> None:
        """Write into the ledgers how many different rows a run shows, of whose examples it shows
        those in `shown`.
        """
        origin = self.table["origin"].astype(np.int64)
        rows = (origin << 40) | self.line
        for number, name in enumerate(self.sources):
            mine = rows[(self.source == number) & shown]
            self.ledgers[name].shown = len(np.unique(mine))

    def divide(self, held_out: Bools) -> tuple[Corpus, Corpus]:
        """(the others, those held out), each with a ledger of its own. Dropped rows stay with the
        first.
        """
        rest = self.subset(np.flatnonzero(~held_out))
        held = self.subset(np.flatnonzero(held_out))
        rest.ledgers = rest._ledgers(self.drops, self._notes)
        held.drops = []
        no_notes = [Counter[str]() for _ in self.sources]
        held.ledgers = held._ledgers([], no_notes)
        return rest, held

    def _load(self, number: int) -> Block:
        block = self._parts[number].block
        if isinstance(block, Block):
            return block
        opened = open_block(block)
        if opened is None:
            raise UserError(
                f"{block}: this file of the token cache is gone or damaged; start again to make "
                "it anew"
            )
        return opened

    def _ledgers(self, drops: list[Drop], notes: list[Counter[str]]) -> dict[str, Ledger]:
        """The ledger of each source. `notes` counts what is not known by example: columns that are
        not read.
        """
        ledgers: dict[str, Ledger] = {}
        for number, name in enumerate(self.sources):
            # A copy of the table costs 80 MB for a million examples; a column costs 4.
            mine = self.table
            if len(self.sources) > 1:
                mine = mine[self.source == number]
            ledger = self._counted(mine)
            ledger.dropped = sum(drop.source == number for drop in drops)
            ledger.read = ledger.shown + ledger.dropped
            abouts = mine["about"][mine["part"] == 0]
            ledger.notes = dict(notes[number] + self._notes_of(abouts))
            ledgers[name] = ledger
        return ledgers

    def _counted(self, mine: Table) -> Ledger:
        """The ledger of the rows that gave examples; `mine` is the table of these."""
        first = mine["part"] == 0
        rows = int(first.sum())
        split = int(mine["split"][first].sum())
        cut_tokens = mine["cut_tokens"][first]
        cut_targets = mine["cut_targets"][first]
        targets = mine["targets"]
        of_shortened = targets[mine["shortened"]]
        return Ledger(
            trained=rows - split,
            split=split,
            shown=rows,
            truncated=int((cut_tokens > 0).sum()),
            examples=len(mine),
            tokens=int(mine["length"].sum()),
            targets=int(targets.sum()),
            tokens_truncated=int(cut_tokens.sum()),
            targets_truncated=int(cut_targets.sum()),
            targets_shortened=int(of_shortened.sum()),
            tokens_repeated=self._repeated(mine),
            kinds=self._kinds(mine),
        )

    def _notes_of(self, abouts: Int32) -> Counter[str]:
        """How many rows have each note; `abouts` int32[rows] are the numbers of what is known of
        each.
        """
        found: Counter[str] = Counter()
        rows = np.bincount(abouts, minlength=len(self._abouts))
        for about, number in self._abouts.items():
            for note in dict.fromkeys(about):
                found[note] += int(rows[number])
        return found

    def _kinds(self, mine: Table) -> dict[str, KindCount]:
        """What there is of each kind of text."""
        if "kinds" in (mine.dtype.names or ()):
            return _counted_kinds(mine)
        texts = [number for number, origin in enumerate(self.origins) if origin.form == "text"]
        is_text = np.isin(mine["origin"], texts)
        found = Ledger()
        _add_kind(found, "output", mine, ~is_text)
        _add_kind(found, "text", mine, is_text)
        return found.kinds

    def _repeated(self, mine: Table) -> int:
        """Tokens of rows that give a sequence for each turn, beyond the longest sequence of each
        row.
        """
        several = [number for about, number in self._abouts.items() if ONE_EACH in about]
        if not several:
            return 0
        chosen = mine[np.isin(mine["about"], several)]
        if not len(chosen):
            return 0
        starts = np.flatnonzero(chosen["part"] == 0)
        lengths = chosen["length"].astype(np.int64)
        longest = np.maximum.reduceat(lengths, starts)
        return int(lengths.sum() - longest.sum())


def _add_kind(ledger: Ledger, kind: str, mine: Table, some: Bools) -> None:
    """Count the targets of `some` examples as one kind of text, and all else in them as context."""
    if not some.any():
        return
    tokens = int(mine["length"][some].sum())
    targets = int(mine["targets"][some].sum())
    weight = float(mine["weight"][some].sum())
    ledger.count(kind, targets, targets, weight)
    ledger.count("context", tokens - targets, 0, 0.0)


def _counted_kinds(mine: Table) -> dict[str, KindCount]:
    """What there is of each kind of text, where the encoder counted it example by example."""
    found = Ledger()
    counts = mine["kinds"]
    tokens = counts["tokens"].sum(0)
    targets = counts["targets"].sum(0)
    weights = counts["weight"].sum(0)
    for number, kind in enumerate(KINDS):
        if tokens[number]:
            weight = float(weights[number])
            found.count(kind, int(tokens[number]), int(targets[number]), weight)
    return found.kinds
