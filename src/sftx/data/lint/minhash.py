"""Near-duplicate texts by MinHash: texts that share most of their word 5-grams, found without
comparing all pairs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sftx.types import UserError

GRAM = 5  # words
# Two texts that share s of their grams meet in some band with probability 1 - (1 - s**8)**16.
HASHES, BANDS = 128, 16


class NearDuplicates:
    """Takes texts one after another, and tells which are much like an earlier one."""

    def __init__(self, similarity: float = 0.85):
        """`similarity`: the share of its grams that a text must have in common with another, by
        estimate.
        """
        self._similarity = similarity
        try:
            rensa = import_module("rensa")
        except ImportError:
            raise UserError(
                'finding near duplicates needs one more package: pip install "sftx[lint]"'
            ) from None
        self._new_sketch = rensa.RMinHash
        self._index = rensa.RMinHashLSH(similarity, HASHES, BANDS)
        # Copies are not kept: many equal texts would all find each other.
        self._originals: dict[int, Any] = {}
        self._count = 0

    def add(self, text: str, prompt: str = "") -> int | None:
        """The number (0 for the first) of the earliest original that `text` is much like; None if
        it is like none.

        With a `prompt`, both must be alike: they count half each, however long they are.
        """
        grams = _grams(text)
        if prompt:
            grams = _balanced(grams, [f"{gram}\0" for gram in _grams(prompt)])
        sketch = self._new_sketch(HASHES, 20)
        sketch.update(grams)
        number = self._count
        self._count = self._count + 1
        for other in sorted(self._index.query(sketch)):
            if self._originals[other].jaccard(sketch) >= self._similarity:
                return other
        self._index.insert(number, sketch)
        self._originals[number] = sketch
        return None


def _grams(text: str) -> list[str]:
    words = text.lower().encode("utf-8", "replace").decode().split()
    count = max(len(words) - GRAM + 1, 1)
    return [" ".join(words[i : i + GRAM]) for i in range(count)]


def _balanced(some: list[str], others: list[str]) -> list[str]:
    """Both sets of grams, the smaller one as often as makes it count as much as the larger."""
    times = round(max(len(some), len(others)) / min(len(some), len(others)))
    few, many = sorted((some, others), key=len)
    return [*many, *(f"{gram}\0{copy}" for gram in few for copy in range(times))]
