"""Near-duplicate texts by MinHash: texts that share most of their word 5-grams, found without comparing all pairs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GRAM = 5  # words
BANDS, ROWS = 16, 8  # two texts that share s of their grams meet in some band with probability 1 - (1 - s**8)**16


def signature(text: str) -> NDArray[np.uint32]:
    """uint32[128]: the smallest hash of the text's word 5-grams under each of 128 hash functions."""
    words = text.lower().split()
    grams = {" ".join(words[i : i + GRAM]) for i in range(max(len(words) - GRAM + 1, 1))}
    base = np.fromiter((zlib.crc32(gram.encode("utf-8", "surrogatepass")) for gram in grams), np.uint64, len(grams))
    smallest = np.full(len(_FACTORS), np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(base), 4096):  # a long text must not need a large table
        hashed = base[start : start + 4096, None] * _FACTORS + _OFFSETS
        smallest = np.minimum(smallest, (hashed >> np.uint64(32)).astype(np.uint32).min(axis=0))
    return smallest


def near_duplicates(signatures: Sequence[NDArray[np.uint32]], similarity: float = 0.85) -> dict[int, int]:
    """For each text that is much like an earlier one: its index and that of the earliest it resembles."""
    if not signatures:
        return {}
    table = np.stack(signatures)
    like: dict[int, int] = {}
    for band in range(BANDS):
        keys = np.ascontiguousarray(table[:, band * ROWS : (band + 1) * ROWS]).view(f"V{4 * ROWS}").ravel()
        _, inverse = np.unique(keys, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)
        for group in groups:
            first = int(group[0])
            for index in map(int, group[1:]):
                known = like.get(index, index)
                if first < known and np.mean(table[first] == table[index]) >= similarity:
                    like[index] = first
    return like


_random = np.random.RandomState(20)
_FACTORS = _random.randint(1, 2**63 - 1, BANDS * ROWS, dtype=np.int64).astype(np.uint64) | np.uint64(1)
_OFFSETS = _random.randint(0, 2**63 - 1, BANDS * ROWS, dtype=np.int64).astype(np.uint64)
