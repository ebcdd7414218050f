"""Stretches of a text that count otherwise than the rest, and the tokens that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from sftx.data.tokenizer import Letters
from sftx.data.truncation import TokenSequence, runs
from sftx.types import KINDS, SAID, Float32, UInt8


class Stretch(NamedTuple):
    """Some characters of a sequence, their kind and what each of their tokens counts."""

    begin: int
    end: int
    kind: str
    weight: float


def with_marks(letters: Letters, piece: str, mark: str) -> Letters:
    """Places in a piece without its marks, as places in the piece."""
    is_kept = np.array([letter != mark for letter in piece], np.bool_)
    kept = np.flatnonzero(is_kept)
    begins = np.append(kept, len(piece))
    ends = np.insert(kept + 1, 0, 0)
    first = begins[letters[:, 0]]
    last = ends[letters[:, 1]]
    return np.stack([first, last], axis=1)


def within(stretches: Sequence[Stretch], counted: int, end: int) -> list[Stretch]:
    """Those of a text that ends at `end`, up to `counted` of which another sequence counts: there
    an output is context, and a prompt counts nothing.
    """
    found: list[Stretch] = []
    earlier: list[Stretch] = []
    for stretch in stretches:
        if stretch.begin >= counted and stretch.end <= end:
            found.append(stretch)
        elif stretch.begin < counted and stretch.kind not in SAID:
            earlier.append(stretch._replace(weight=0.0))
    return found + earlier


def with_weights(
    tokens: TokenSequence,
    borders: Sequence[int],
    own: Sequence[tuple[str, float]],
    stretches: Sequence[Stretch],
    letters: Letters,
) -> TokenSequence:
    """The sequence with the kind and the weight of each token. Chunks end at the `borders`; a token
    belongs to a stretch if any of its `letters` does.
    """
    count = len(tokens.ids)
    weights: Float32 = np.zeros(count, np.float32)
    kinds: UInt8 = np.zeros(count, np.uint8)
    for k, (kind, weight) in enumerate(own):
        chunk = slice(borders[k], borders[k + 1])
        weights[chunk] = weight
        kinds[chunk] = KINDS.index(kind)
    is_output = np.zeros(count, np.bool_)
    for begin, end in tokens.spans:
        is_output[begin:end] = True
    for stretch in stretches:
        begin = int(np.searchsorted(letters[:, 1], stretch.begin, "right"))
        end = int(np.searchsorted(letters[:, 0], stretch.end, "left"))
        # A thought belongs to an output; a prompt's content that an output repeats does not.
        inside = is_output[begin:end] == (stretch.kind in SAID)
        weights[begin:end][inside] = stretch.weight
        kinds[begin:end][inside] = KINDS.index(stretch.kind)
    asked = runs(np.where(is_output, 0, weights))
    return replace(tokens, weights=weights, kinds=kinds, asked=asked)
