"""Which queries of a pack see which keys, where segments share prefixes: each segment itself, and, for
every depth, the ancestors of that depth with all that continue them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftx.types import Int32

Int64 = NDArray[np.int64]


def prefix_index(cu_seqlens: Int32, parent: Int32) -> list[Tensor]:
    """What `shared_segments` asks of a pack: (queries, keys, bounds, table), all on the host.

    For every depth, and for every segment of that depth that others continue: `queries` int64[Q] are
    the places of all tokens that continue it, `keys` int64[K] those of its own; `bounds` int32[B] are
    the `cu_seqlens` of the pack, then of each depth those of its queries and those of its keys;
    `table` int64[1 + 3 x depths] holds the number of segments, and of each depth those of its
    ancestors, queries and keys.
    """
    chains: list[tuple[int, ...]] = []
    for up in parent.tolist():
        chains.append((*chains[up], up) if up >= 0 else ())
    queries: list[Int64] = []
    keys: list[Int64] = []
    bounds: list[Int64] = [cu_seqlens.astype(np.int64)]
    table = [len(chains)]
    for depth in range(max(map(len, chains))):
        places, own = _of_depth(cu_seqlens, chains, depth)
        queries += places
        keys += own
        bounds.append(_bounds(places))
        bounds.append(_bounds(own))
        table += [len(own), int(bounds[-2][-1]), int(bounds[-1][-1])]
    return [
        torch.from_numpy(np.concatenate(queries)),
        torch.from_numpy(np.concatenate(keys)),
        torch.from_numpy(np.concatenate(bounds)).int(),
        torch.tensor(table),
    ]


def _of_depth(
    cu_seqlens: Int32, chains: list[tuple[int, ...]], depth: int
) -> tuple[list[Int64], list[Int64]]:
    """Of every ancestor of that depth, the places of what continues it, and its own."""
    below: dict[int, list[Int64]] = {}
    for segment, chain in enumerate(chains):
        if depth < len(chain):
            below.setdefault(chain[depth], []).append(_places(cu_seqlens, segment))
    places: list[Int64] = []
    own: list[Int64] = []
    for ancestor, parts in below.items():
        continuing = np.concatenate(parts)
        if len(continuing):  # a branch may be empty
            places.append(continuing)
            own.append(_places(cu_seqlens, ancestor))
    return places, own


def _places(cu_seqlens: Int32, segment: int) -> Int64:
    return np.arange(cu_seqlens[segment], cu_seqlens[segment + 1], dtype=np.int64)


def _bounds(parts: list[Int64]) -> Int64:
    return np.cumsum([0, *map(len, parts)])


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
        queries = max(b - a for a, b in itertools.pairwise(self.bounds_q))
        keys = max(b - a for a, b in itertools.pairwise(self.bounds_k))
        return queries, keys


def parts_of(index: list[Tensor]) -> Iterator[Part]:
    """The parts of a pack; `index` = (positions, queries, keys, bounds, bounds on the host, table)."""
    _, queries, keys, bounds, host, table = index
    limits = host.tolist()
    segments, *counts = table.tolist()
    at = segments + 1
    yield Part(None, None, bounds[:at], bounds[:at], limits[:at], limits[:at])
    first_query = first_key = 0
    for number, some_queries, some_keys in zip(*[iter(counts)] * 3, strict=True):
        q, k = slice(at, at + number + 1), slice(at + number + 1, at + 2 * number + 2)
        yield Part(
            queries[first_query : first_query + some_queries],
            keys[first_key : first_key + some_keys],
            bounds[q],
            bounds[k],
            limits[q],
            limits[k],
        )
        at += 2 * number + 2
        first_query += some_queries
        first_key += some_keys
