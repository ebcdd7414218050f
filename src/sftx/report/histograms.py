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
    top = max(int(corpus.lengths.max(initial=1)), 8)
    top = top if most is None else min(top, most)
    edges = np.unique(np.linspace(0, top, BARS + 1).astype(np.int64))
    counts, _ = np.histogram(np.clip(corpus.lengths, 0, edges[-1]), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def weights_of(corpus: Corpus) -> list[WeightCount]:
    """How many tokens have which weight, over `LOOKED_AT` examples; 0 first."""
    counts: Counter[float] = Counter()
    for index in evenly(len(corpus), LOOKED_AT):
        found, tokens = np.unique(corpus.example(index).weights, return_counts=True)
        counts.update(dict(zip(found.tolist(), tokens.tolist(), strict=True)))
    if len(counts) <= KINDS:
        return [{"weight": f"{weight:.4g}", "tokens": counts[weight]} for weight in sorted(counts)]
    weights = np.array(sorted(counts))
    tokens = np.array([counts[weight] for weight in weights])
    tokens[weights == 0] = 0
    inside, edges = np.histogram(weights, KINDS - 1, weights=tokens)
    spans: list[WeightCount] = [{"weight": "0", "tokens": counts[0.0]}]
    for count, low, high in zip(inside, edges, edges[1:], strict=False):
        spans.append({"weight": f"{low:.3g} to {high:.3g}", "tokens": int(count)})
    return spans
