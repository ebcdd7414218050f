"""Which queries of a pack see which keys, where segments share prefixes.

The chain of a segment is what it continues: its ancestors, from the root on. It is asked for in two
ways: by depth, as flash attention takes it, and by family, as matrix products do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftx.types import Int32

Int64 = NDArray[np.int64]
Chain = tuple[int, ...]
"""Numbers of the segments that one continues, from the root on."""


def prefix_index(cu_seqlens: Int32, parent: Int32) -> list[Tensor]:
    """What attention asks of a pack: (queries, keys, bounds, table), all on the host; nothing where
    no token continues another segment.

    For every depth, and for every segment of that depth that others continue: `queries` int64[Q] are
    the places of all tokens that continue it, `keys` int64[K] those of its own. `bounds` int32[B] are
    the `cu_seqlens` of the pack, then of each depth those of its queries and those of its keys.
    `table` int64[1 + segments + 3 x depths] holds the number of segments, the parent of each, and of
    each depth the numbers of its ancestors, queries and keys.
    """
    parents: list[int] = parent.tolist()
    chains = _chains(parents)
    deepest = max(len(chain) for chain in chains)
    queries: list[Int64] = []
    keys: list[Int64] = []
    bounds: list[Int64] = [cu_seqlens.astype(np.int64)]
    table = [len(parents), *parents]
    for depth in range(deepest):
        continuing, own = _of_depth(cu_seqlens, chains, depth)
        if not own:
            continue
        queries += continuing
        keys += own
        bounds_q = _bounds(continuing)
        bounds_k = _bounds(own)
        bounds += [bounds_q, bounds_k]
        table += [len(own), int(bounds_q[-1]), int(bounds_k[-1])]
    if not queries:
        return []
    return [
        torch.from_numpy(np.concatenate(queries)),
        torch.from_numpy(np.concatenate(keys)),
        torch.from_numpy(np.concatenate(bounds)).int(),
        torch.tensor(table),
    ]


def _chains(parents: list[int]) -> list[Chain]:
    """The chain of every segment; parents come before their children."""
    chains: list[Chain] = []
    for parent in parents:
        chain: Chain = ()
        if parent >= 0:
            chain = (*chains[parent], parent)
        chains.append(chain)
    return chains


def _of_depth(
    cu_seqlens: Int32, chains: list[Chain], depth: int
) -> tuple[list[Int64], list[Int64]]:
    """Of every ancestor of that depth, the places of what continues it, and its own."""
    below: dict[int, list[Int64]] = {}
    for segment, chain in enumerate(chains):
        if depth < len(chain):
            places = _places(cu_seqlens, segment)
            below.setdefault(chain[depth], []).append(places)
    continuing: list[Int64] = []
    own: list[Int64] = []
    for ancestor, parts in below.items():
        places = np.concatenate(parts)
        if len(places):  # a branch may be empty
            continuing.append(places)
            own.append(_places(cu_seqlens, ancestor))
    return continuing, own


def _places(cu_seqlens: Int32, segment: int) -> Int64:
    return np.arange(cu_seqlens[segment], cu_seqlens[segment + 1], dtype=np.int64)


def _bounds(parts: list[Int64]) -> Int64:
    lengths = [len(part) for part in parts]
    return np.cumsum([0, *lengths])


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences of queries and the sequence of keys that each sees, causally in the first part."""

    queries: Tensor | None  # int64, their places in the pack; None: all of them, as they stand
    keys: Tensor | None
    cu_q: Tensor  # int32, on the device
    cu_k: Tensor
    bounds_q: list[int]
    bounds_k: list[int]

    @property
    def causal(self) -> bool:
        """Whether the keys are the queries' own segments."""
        return self.queries is None

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest sequence of queries, and of keys."""
        return _longest(self.bounds_q), _longest(self.bounds_k)


def _longest(bounds: list[int]) -> int:
    return max(b - a for a, b in itertools.pairwise(bounds))


def parts_of(index: list[Tensor]) -> Iterator[Part]:
    """The parts of a pack: all segments with themselves, then for every depth the ancestors of that
    depth with what continues them.

    `index` = (positions, queries, keys, bounds, bounds on the host, table).
    """
    _, queries, keys, bounds, host, table = index
    limits: list[int] = host.tolist()
    segments, *rest = table.tolist()
    counts = iter(rest[segments:])
    at = segments + 1  # where the next bounds begin
    yield Part(None, None, bounds[:at], bounds[:at], limits[:at], limits[:at])
    first_query = 0
    first_key = 0
    for ancestors in counts:
        last_query = first_query + next(counts)
        last_key = first_key + next(counts)
        of_queries = slice(at, at + ancestors + 1)
        at = of_queries.stop
        of_keys = slice(at, at + ancestors + 1)
        at = of_keys.stop
        yield Part(
            queries[first_query:last_query],
            keys[first_key:last_key],
            bounds[of_queries],
            bounds[of_keys],
            limits[of_queries],
            limits[of_keys],
        )
        first_query = last_query
        first_key = last_key


class Run(NamedTuple):
    """Segments that continue the same chain, and stand beside each other in the pack."""

    segments: list[slice]  # their places in the pack

    @property
    def start(self) -> int:
        """Where the first begins."""
        return self.segments[0].start

    @property
    def stop(self) -> int:
        """Where the last ends."""
        return self.segments[-1].stop

    @property
    def tokens(self) -> int:
        """Tokens of all."""
        return self.stop - self.start


class Family(NamedTuple):
    """A chain, and all segments that continue it directly."""

    chain: list[slice]  # the places of its pieces in the pack, from the root on
    runs: list[Run]

    @property
    def before(self) -> int:
        """Tokens of the chain."""
        return sum(piece.stop - piece.start for piece in self.chain)


def families_of(index: list[Tensor], most: int) -> list[Family]:
    """The families of a pack. A run has at most `most` tokens, or one segment.

    `index` as `parts_of` takes it.
    """
    host, table = index[4:]
    segments, *rest = table.tolist()
    parents = rest[:segments]
    bounds: list[int] = host.tolist()
    places = [slice(*pair) for pair in itertools.pairwise(bounds[: segments + 1])]
    families: dict[int, Family] = {}
    for own, parent, chain in zip(places, parents, _chains(parents), strict=True):
        if parent not in families:
            pieces = [places[ancestor] for ancestor in chain]
            families[parent] = Family(pieces, [])
        if own.start == own.stop:  # a branch may be empty
            continue
        runs = families[parent].runs
        if runs and runs[-1].stop == own.start and own.stop - runs[-1].start <= most:
            runs[-1].segments.append(own)
        else:
            runs.append(Run([own]))
    return list(families.values())
