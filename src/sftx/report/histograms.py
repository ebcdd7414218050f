"""How the lengths and the weights of examples are spread, as the pages show it."""

from __future__ import annotations

from collections import Counter
from typing import TypedDict

import numpy as np

from sftx.data.store.corpus import Corpus
from sftx.evenly import evenly

BARS = 40
"""Bars of lengths."""
KINDS = 12
"""Different weights that are counted each for itself; of more, spans are counted."""
LOOKED_AT = 1000
"""Examples whose weights are counted, evenly spaced: their tokens must be read for it."""


class Lengths(TypedDict):
    """`counts[i]` examples have at least `edges[i]` tokens, and fewer than `edges[i + 1]` (the last
    edge included).
    """

    edges: list[int]
    counts: list[int]


class WeightCount(TypedDict):
    """How many tokens have a weight (or one of a span), in words."""

    weight: str
    tokens: int


def lengths_of(corpus: Corpus, most: int | None = None) -> Lengths:
    """How many examples have which length; those over `most` tokens count in the last bar."""
    longest = int(corpus.lengths.max(initial=1))
    top = max(longest, 8)
    if most is not None:
        top = min(top, most)
    even = np.linspace(0, top, BARS + 1).astype(np.int64)
    edges = np.unique(even)
    lengths = np.minimum(corpus.lengths, edges[-1])
    counts, _ = np.histogram(lengths, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def weights_of(corpus: Corpus) -> list[WeightCount]:
    """How many tokens have which weight, over `LOOKED_AT` examples; 0 first."""
    counts: Counter[float] = Counter()
    for index in evenly(len(corpus), LOOKED_AT):
        weights = corpus.example(index).weights
        found, tokens = np.unique(weights, return_counts=True)
        for weight, count in zip(found.tolist(), tokens.tolist(), strict=True):
            counts[weight] += count
    if len(counts) > KINDS:
        return _spans_of(counts)
    shown: list[WeightCount] = []
    for weight in sorted(counts):
        shown.append({"weight": f"{weight:.4g}", "tokens": counts[weight]})
    return shown


def _spans_of(counts: Counter[float]) -> list[WeightCount]:
    """The tokens of weight 0, and of equal spans of weights."""
    weights = sorted(counts)
    tokens = [counts[weight] if weight else 0 for weight in weights]
    inside, edges = np.histogram(weights, KINDS - 1, weights=tokens)
    spans: list[WeightCount] = [{"weight": "0", "tokens": counts[0.0]}]
    for i, count in enumerate(inside):
        low = edges[i]
        high = edges[i + 1]
        spans.append({"weight": f"{low:.3g} to {high:.3g}", "tokens": int(count)})
    return spans
