"""Examples longer than `data.max_length`: cut in pieces, truncated, dropped or refused, with every
loss counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sftx.types import KINDS, Example, Float32, RowError

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


def runs(weights: Float32 | NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """The (begin, end) of the stretches of weights other than 0."""
    edges = np.flatnonzero(np.diff(weights != 0, prepend=False, append=False)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


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
            piece, begin = _piece(sequence, length - max_length, length, max_length)
            lost = begin - sequence.begins_with_bos
        case "truncate_right":
            piece, _ = _piece(sequence, 0, max_length, max_length)
            lost = length - max_length
    return Fitted([piece] if piece.targets else [], lost, targets - piece.targets)


def _piece(
    sequence: TokenSequence, begin: int, end: int, max_length: int
) -> tuple[TokenSequence, int]:
    """Tokens `begin..end` with the BOS before them where one is wanted, and where they begin after
    making room.
    """
    ids = sequence.ids
    weights = sequence.weights
    head: list[int] = []
    needs_one = sequence.begins_with_bos or weights[begin] != 0
    if begin > 0 and sequence.bos is not None and needs_one:
        head = [sequence.bos]
        begin = max(begin, end - max_length + 1)
    piece_ids = np.concatenate([np.array(head, np.int32), ids[begin:end]])
    piece_weights = np.concatenate([np.zeros(len(head), np.float32), weights[begin:end]])
    is_prompt = ~sequence.said
    # A BOS comes back, and the first token of a plain text is output, though it carries no weight.
    is_output = not is_prompt[1:2].all()
    first = 1 if sequence.begins_with_bos or is_output else 0
    gone = is_prompt[first:begin]
    piece = replace(
        sequence,
        ids=piece_ids,
        weights=piece_weights,
        spans=(),
        asked=(),
        shortened=sequence.shortened or bool(gone.any()),
    )
    if sequence.kinds is not None:
        before = np.zeros(len(head), np.uint8)
        kinds = np.concatenate([before, sequence.kinds[begin:end]])
        piece = replace(piece, kinds=kinds)
    return piece, begin


def _split(sequence: TokenSequence, max_length: int) -> Fitted:
    spans = _chunks(sequence, max_length)
    pieces: list[TokenSequence] = []
    covered = np.zeros(len(sequence.ids), dtype=np.bool_)
    done = before = 0  # spans that are in a piece; outputs that end before the next of them
    while done < len(spans):
        first = spans[done][0]
        # Room for the whole prompt of the first output: no answer is trained without its question
        # where both fit.
        while before < len(sequence.spans) and sequence.spans[before][1] <= first:
            before += 1
        asked = (sequence.spans[before - 1][1] if before else 0) - sequence.begins_with_bos
        context, prompt = max_length, min(asked, first - 1)  # something stands before it
        if sequence.context is not None:
            context = sequence.context
            prompt = first - 1
        count = 1
        while done + count < len(spans) and spans[done + count][1] - prompt <= max_length:
            count += 1
        end = spans[done + count - 1][1]
        start = max(end - max_length, first - context, 0)
        piece, begin = _piece(sequence, start, end, max_length)
        head = len(piece.ids) - (end - first)
        _make_context(piece, head)
        pieces.append(piece)
        covered[begin:end] = True
        covered[0] |= sequence.begins_with_bos
        done += count
    assert sum(piece.targets for piece in pieces) == sequence.targets
    return Fitted(pieces, int(np.count_nonzero(~covered)))


def _make_context(piece: TokenSequence, head: int) -> None:
    """Let the first `head` tokens be context: earlier outputs are trained in their own piece."""
    piece.weights[:head] = 0
    if piece.kinds is not None:
        piece.kinds[:head][piece.said[:head]] = KINDS.index("context")


def _chunks(sequence: TokenSequence, max_length: int) -> list[tuple[int, int]]:
    """The trained spans, those that fit in no piece cut so that each continuation keeps left
    context.
    """
    context = max_length // 4 if sequence.context is None else sequence.context
    size = max_length - max(1, context)
    chunks: list[tuple[int, int]] = []
    for begin, end in sorted(sequence.spans + sequence.asked):
        begin = max(begin, 1)
        if not sequence.weights[begin:end].any():
            continue
        if end - begin < max_length:
            chunks.append((begin, end))
        else:
            first = size
            if begin < size:  # with the whole prompt
                first = max(max_length - begin, 0)
            starts = [begin, *range(begin + first, end, size)]
            chunks += list(pairwise([*starts, end]))
    return chunks
