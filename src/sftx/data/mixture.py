"""Several sources in one corpus: how often each is shown in an epoch, and which of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from sftx.data.rotation import Rotation
from sftx.data.store.block import Table
from sftx.data.store.corpus import Corpus
from sftx.settings.schema import Source
from sftx.types import Bools

Indices = NDArray[np.intp]


def weighted(corpus: Corpus, sources: Sequence[Source], mix_by: str, seed: int) -> Corpus:
    """Every source as often in an epoch as its weight says: whole copies, and for the fraction a
    rotating share.

    The fraction is one more copy of the source in the corpus, of which each epoch shows another
    share (`Corpus.rotations`). At least one row of a source is shown in every epoch.
    """
    times = _times(corpus, sources, mix_by)
    if all(shown == 1 for shown in times):
        return corpus
    order: list[Indices] = []
    rotations: list[Rotation] = []
    for number, (source, shown) in enumerate(zip(sources, times, strict=True)):
        mine = np.flatnonzero(corpus.source == number)
        starts = np.flatnonzero(corpus.part[mine] == 0)
        copies = int(shown)
        fraction = shown - copies
        rows = copies * len(starts)
        order += [mine] * copies
        if fraction and len(mine):
            per_epoch = fraction * len(starts)
            if not copies:
                per_epoch = max(per_epoch, 1.0)
            hashes = corpus.table["row"][mine[starts]]
            keys = _keys(hashes, f"{source.name} {seed}")
            begin = sum(map(len, order))
            borders = np.append(starts, len(mine))
            rotations.append(_circle(keys, borders, begin, per_epoch))
            order.append(mine)
            rows += per_epoch
        if shown != 1:
            note = f"rows in one epoch, shown {shown:.4g} times"
            corpus.ledgers[source.name or source.path].notes[note] = round(rows)
    mixed = corpus.subset(np.concatenate(order))
    mixed.rotations = tuple(rotations)
    return mixed


def weighted_held_out(corpus: Corpus, sources: Sequence[Source], seed: int) -> Corpus:
    """Held-out sources as often as their weights say; of a fraction the same rows always, so that
    losses compare.
    """
    if all(source.weight == 1 for source in sources):
        return corpus
    order: list[Indices] = []
    for number, source in enumerate(sources):
        mine = corpus.source == number
        copies = int(source.weight)
        fraction = source.weight - copies
        some = choose(corpus.table, mine, fraction, f"{source.name} {seed}")
        order += [np.flatnonzero(mine)] * copies
        order.append(np.flatnonzero(some))
    mixed = corpus.subset(np.concatenate(order))
    mixed.count_shown(np.ones(len(mixed), np.bool_))
    return mixed


def choose(table: Table, mask: Bools, share: float, salt: str, least: int = 0) -> Bools:
    """bool[N]: a `share` of the rows in `mask`, all examples of a row together, by a hash of row
    and salt.
    """
    first = mask & (table["part"] == 0)
    rows = int(first.sum())
    number = max(least, round(share * rows))
    if not number:
        return np.zeros(len(mask), np.bool_)
    keys = _keys(table["row"], salt)
    ascending = np.sort(keys[first])
    last = ascending[number - 1]
    return mask & (keys <= last)


def _times(corpus: Corpus, sources: Sequence[Source], mix_by: str) -> list[float]:
    """How often an epoch shows each source."""
    times = [source.weight for source in sources]
    if mix_by == "rows":
        return times
    total = int(corpus.lengths.sum())
    scaled: list[float] = []
    for number, weight in enumerate(times):
        mine = corpus.lengths[corpus.source == number]
        tokens = max(int(mine.sum()), 1)
        wanted = weight * total / sum(times)  # tokens in an epoch
        scaled.append(round(wanted / tokens, 9))  # 1 stays 1
    return scaled


def _keys(rows: NDArray[np.uint64], salt: str) -> NDArray[np.uint64]:
    """A hash of each row hash and the salt: a row keeps its own when others are added."""
    salted = blake2b(salt.encode(), digest_size=8).digest()
    keys = rows ^ np.uint64(int.from_bytes(salted, "little"))
    # The mixing of splitmix64.
    keys ^= keys >> np.uint64(30)
    keys *= np.uint64(0xBF58476D1CE4E5B9)
    keys ^= keys >> np.uint64(27)
    keys *= np.uint64(0x94D049BB133111EB)
    keys ^= keys >> np.uint64(31)
    return keys


def _circle(keys: NDArray[np.uint64], starts: Indices, begin: int, per_epoch: float) -> Rotation:
    """Rows in the order of their `keys`; row r has the examples `begin + starts[r]` up to `begin +
    starts[r + 1]`.
    """
    rank = np.argsort(keys, kind="stable")
    sizes = np.diff(starts)[rank]
    ends = np.cumsum(sizes)
    total = int(starts[-1])
    number_in_row = np.arange(total) - np.repeat(ends - sizes, sizes)
    first_of_row = begin + np.repeat(starts[:-1][rank], sizes)
    order = first_of_row + number_in_row
    row_starts = np.append(0, ends)
    return Rotation(order.astype(np.int64), row_starts.astype(np.int64), per_epoch)
