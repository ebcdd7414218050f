"""Examples longer than `data.max_length`: cut in pieces, truncated, dropped or refused, with every
loss counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from sftx.types import KINDS, Bools, Example, Float32, RowError

TooLong = Literal["split", "truncate_left", "truncate_right", "drop", "error"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence(Example):
    """An example of any length, with what has to be known to cut it.

    `spans` are the (begin, end) of its outputs, in order, `asked` those of prompts that carry weight
    too; `weights` is 0 outside of both. `bos` is put
    before a piece whose first token would otherwise be a target, and, if the sequence
    `begins_with_bos`, before every piece. `context` limits how many tokens without weight a split
    repeats before a piece; None = as many as fit.
    """

    spans: tuple[tuple[int, int], ...] = ()
    asked: tuple[tuple[int, int], ...] = ()
    bos: int | None = None
    begins_with_bos: bool = False
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of one sequence: its pieces (without spans, unless it fits whole), and how many
    of its tokens and targets are in none of them.
    """

    pieces: list[TokenSequence]
    tokens_lost: int = 0
    targets_lost: int = 0


def runs(weights: Float32 | Bools) -> tuple[tuple[int, int], ...]:
    """The (begin, end) of the stretches of weights other than 0."""
    changes = np.diff(weights != 0, prepend=False, append=False)
    edges = np.flatnonzero(changes).tolist()
    begins = edges[::2]
    ends = edges[1::2]
    return tuple(zip(begins, ends, strict=True))


def fit(sequence: TokenSequence, max_length: int, too_long: TooLong) -> Fitted:
    """Make `sequence` at most `max_length` tokens long, as `too_long` says. `RowError` if it says
    `error`.

    `split` loses no target: each is in exactly one piece, with at least one token before it.
    """
    length = len(sequence.ids)
    if length <= max_length:
        return Fitted([sequence])
    targets = sequence.targets
    match too_long:
        case "error":
            raise RowError(
                f"{length:,} tokens, but data.max_length is {max_length:,}: raise it, or set "
                "data.too_long to split, "
                "truncate_left, truncate_right or drop"
            )
        case "drop":
            return Fitted([], length, targets)
        case "split":
            return _split(sequence, max_length)
        case "truncate_left":
            prompt = _first_prompt(sequence)
            piece, begin = _piece(sequence, length - max_length, length, max_length, prompt)
            lost = begin - sequence.begins_with_bos
        case "truncate_right":
            piece, _ = _piece(sequence, 0, max_length, max_length, 0)
            lost = length - max_length
    targets_lost = targets - piece.targets
    if not piece.targets:
        return Fitted([], length, targets_lost)
    return Fitted([piece], lost, targets_lost)


def _piece(
    sequence: TokenSequence, begin: int, end: int, max_length: int, prompt: int
) -> tuple[TokenSequence, int]:
    """Tokens `begin..end` with the BOS before them where one is wanted, and where they begin after
    making room. `prompt` = where the first prompt begins.
    """
    needs_one = sequence.begins_with_bos or sequence.weights[begin] != 0
    bos = sequence.bos if begin > 0 and needs_one else None
    if bos is not None:
        begin = max(begin, end - max_length + 1)
    start = begin
    if bos is not None:
        start = begin - 1  # the BOS takes the place of the token there
    ids = sequence.ids[start:end].copy()
    weights = sequence.weights[start:end].copy()
    kinds = sequence.kinds
    if kinds is not None:
        kinds = kinds[start:end].copy()
    if bos is not None:
        ids[0] = bos
        weights[0] = 0
        if kinds is not None:
            kinds[0] = 0
    piece = replace(
        sequence,
        ids=ids,
        weights=weights,
        kinds=kinds,
        spans=(),
        asked=(),
        shortened=sequence.shortened or prompt < begin,
    )
    return piece, begin


def _first_prompt(sequence: TokenSequence) -> int:
    """Where the first token of a prompt stands; the length where there is none."""
    is_prompt = ~sequence.said
    # A BOS comes back, and the first token of a plain text is output, though it carries no weight.
    is_output = not is_prompt[1:2].all()
    first = 1 if sequence.begins_with_bos or is_output else 0
    found = np.flatnonzero(is_prompt[first:])
    if len(found):
        return first + int(found[0])
    return len(is_prompt)


def _split(sequence: TokenSequence, max_length: int) -> Fitted:
    spans = _chunks(sequence, max_length)
    pieces: list[TokenSequence] = []
    covered = np.zeros(len(sequence.ids), dtype=np.bool_)
    done = 0  # spans that are in a piece
    first_prompt = _first_prompt(sequence)
    while done < len(spans):
        first = spans[done][0]
        if sequence.context is None:
            # Room for the whole prompt of the first output: no answer is trained without its
            # question where both fit.
            context = max_length
            asked = _end_before(sequence.spans, first) - sequence.begins_with_bos
            prompt = min(asked, first - 1)  # something stands before it
        else:
            context = sequence.context
            prompt = first - 1
        count = 1
        while done + count < len(spans) and spans[done + count][1] - prompt <= max_length:
            count += 1
        end = spans[done + count - 1][1]
        start = max(end - max_length, first - context, 0)
        piece, begin = _piece(sequence, start, end, max_length, first_prompt)
        own = end - first
        _make_context(piece, len(piece.ids) - own)
        pieces.append(piece)
        covered[begin:end] = True
        covered[0] |= sequence.begins_with_bos
        done += count
    assert sum(piece.targets for piece in pieces) == sequence.targets
    return Fitted(pieces, int(np.count_nonzero(~covered)))


def _end_before(spans: tuple[tuple[int, int], ...], at: int) -> int:
    """Where the last of the spans that end before `at` ends; 0 if none does."""
    ends = [end for _, end in spans if end <= at]
    return max(ends, default=0)


def _make_context(piece: TokenSequence, head: int) -> None:
    """Let the first `head` tokens be context: earlier outputs are trained in their own piece."""
    piece.weights[:head] = 0
    if piece.kinds is not None:
        piece.kinds[:head][piece.said[:head]] = KINDS.index("context")


def _chunks(sequence: TokenSequence, max_length: int) -> list[tuple[int, int]]:
    """The trained spans, those that fit in no piece cut so that each continuation keeps left
    context.
    """
    context = sequence.context
    if context is None:
        context = max_length // 4
    size = max_length - max(1, context)
    chunks: list[tuple[int, int]] = []
    for begin, end in sorted(sequence.spans + sequence.asked):
        begin = max(begin, 1)
        if not sequence.weights[begin:end].any():
            continue
        if end - begin < max_length:
            chunks.append((begin, end))
            continue
        first = size
        if begin < size:  # with the whole prompt
            first = max(max_length - begin, 0)
        cuts = range(begin + first, end, size)
        chunks += pairwise([begin, *cuts, end])
    return chunks
