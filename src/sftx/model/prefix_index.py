"""Which queries of a pack see which keys, where segments share prefixes: each segment itself, and, for
every depth, the ancestors of that depth with all that continue them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sftx.types import Int32


def prefix_index(cu_seqlens: Int32, parent: Int32) -> list[Tensor]:
    """What `shared_segments` asks of a pack: (queries, keys, bounds, table), all on the host.

    For every depth, and for every segment of that depth that others continue: `queries` int64[Q] are
    the places of all tokens that continue it, `keys` int64[K] those of its own; `bounds` int32[B] are
    the `cu_seqlens` of the pack, then of each depth those of its queries and those of its keys;
    `table` int64[1 + 3 x depths] holds the number of segments, and of each depth those of its
    ancestors, queries and keys.
    """
    lengths = np.diff(cu_seqlens).tolist()
    ancestors: list[tuple[int, ...]] = []
    for up in parent.tolist():
        ancestors.append((*ancestors[up], up) if up >= 0 else ())
    queries: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    bounds: list[Any] = [cu_seqlens]
    table = [len(lengths)]
    for depth in range(max(map(len, ancestors), default=0)):
        below: dict[int, list[int]] = {}
        for segment, above in enumerate(ancestors):
            if len(above) > depth and lengths[segment] and lengths[above[depth]]:
                below.setdefault(above[depth], []).append(segment)
        if not below:
            continue
        places = [
            np.concatenate([np.arange(cu_seqlens[s], cu_seqlens[s + 1]) for s in some])
            for some in below.values()
        ]
        own = [np.arange(cu_seqlens[a], cu_seqlens[a + 1]) for a in below]
        queries += places
        keys += own
        for parts in (places, own):
            bounds.append(np.cumsum([0, *map(len, parts)]))
        table += [len(own), sum(map(len, places)), sum(map(len, own))]
    found = (*((np.concatenate(x) if x else np.zeros(0)) for x in (queries, keys, bounds)), table)
    dtypes = (torch.int64, torch.int64, torch.int32, torch.int64)
    return [torch.as_tensor(x).to(dtype) for x, dtype in zip(found, dtypes, strict=True)]


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

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest sequence of queries, and of keys."""
        found = [
            max(b - a for a, b in itertools.pairwise(bounds))
            for bounds in (self.bounds_q, self.bounds_k)
        ]
        return found[0], found[1]


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
