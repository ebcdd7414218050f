"""Near-duplicate texts by MinHash: texts that share most of their word 5-grams, found without comparing all pairs."""

from __future__ import annotations

from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportAttributeAccessIssue] (compiled)

GRAM = 5  # words
HASHES, BANDS = 128, 16  # two texts that share s of their grams meet in some band with probability 1 - (1 - s**8)**16


class NearDuplicates:
    """Takes texts one after another, and tells which are much like an earlier one."""

    def __init__(self, similarity: float = 0.85):
        """`similarity`: the share of its grams that a text must have in common with another, by estimate."""
        self._similarity = similarity
        self._index = RMinHashLSH(similarity, HASHES, BANDS)
        self._originals: dict[int, RMinHash] = {}  # copies are not kept: many equal texts would all find each other
        self._count = 0

    def add(self, text: str) -> int | None:
        """The number (0 for the first) of the earliest original that `text` is much like; None if it is like none."""
        words = text.lower().split()
        sketch = RMinHash(HASHES, 20)
        starts = range(max(len(words) - GRAM + 1, 1))
        sketch.update([" ".join(words[i : i + GRAM]).encode("utf-8", "surrogatepass") for i in starts])
        number, self._count = self._count, self._count + 1
        for other in sorted(self._index.query(sketch)):
            if self._originals[other].jaccard(sketch) >= self._similarity:
                return other
        self._index.insert(number, sketch)
        self._originals[number] = sketch
        return None
