"""Rows without turns: plain text, segments and tokens, on their way to token sequences."""

from __future__ import annotations

import numpy as np

from sftx.data.chat.text_sequence import TextSequence
from sftx.data.sources.validate import product
from sftx.data.tokenizer import Tokenizer
from sftx.data.truncation import TokenSequence, runs
from sftx.types import KINDS, Row, RowError


def without_turns(
    row: Row, tokenizer: Tokenizer, by_kind: bool
) -> tuple[list[TextSequence], TokenSequence | None]:
    """The texts of a row, or its tokens if it came with them. `by_kind`: kinds of text are told
    apart.
    """
    if row.kind == "tokens":
        return [], _tokens(row, tokenizer, by_kind)
    if row.kind == "text":
        return [_text(row, tokenizer, by_kind)], None
    return [_segments(row, by_kind)], None


def _segments(row: Row, by_kind: bool) -> TextSequence:
    sequence = TextSequence([], alone=True)
    for part in row.phrases:
        weight = product(part.weight, row.weight)
        sequence.chunks.append((part.text, weight))
        if by_kind:
            kind = "output" if weight else "context"
            sequence.own.append((kind, weight))
    return sequence


def _text(row: Row, tokenizer: Tokenizer, by_kind: bool) -> TextSequence:
    """Plain text. A BOS or EOS spelled at its ends is that token: it is neither doubled nor
    escaped.
    """
    bos = tokenizer.special.get("bos_token", "")
    eos = tokenizer.special.get("eos_token", "")
    spells_bos = bool(bos) and row.text.startswith(bos)
    text = row.text.removeprefix(bos).removesuffix(eos)
    return TextSequence(
        chunks=[(text, row.weight)],
        eos=True,
        alone=True,
        bos=tokenizer.adds_bos or spells_bos,
        context=1,
        own=[("text", row.weight)] if by_kind else [],
    )


def _tokens(row: Row, tokenizer: Tokenizer, by_kind: bool) -> TokenSequence:
    size = tokenizer.vocab_size
    for i, token in enumerate(row.ids):
        if not 0 <= token < size:
            raise RowError(f"input_ids[{i}] is {token}, outside the vocabulary of {size:,} tokens")
    weights = np.array([product(weight, row.weight) for weight in row.weights], np.float32)
    kinds = None
    if by_kind:
        kinds = np.where(weights != 0, KINDS.index("output"), 0).astype(np.uint8)
    ids = np.array(row.ids, np.int32)
    return TokenSequence(ids, weights, kinds=kinds, spans=runs(weights))
