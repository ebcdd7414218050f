"""Rows without turns: plain text, segments and tokens, on their way to token sequences."""

from __future__ import annotations

import numpy as np

from sftx.data.chat.spans import TextSequence
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
    chunks = [(part.text, product(part.weight, row.weight)) for part in row.phrases]
    sequence = TextSequence(chunks, alone=True)
    if by_kind:
        sequence.own = [("output" if weight else "context", weight) for _, weight in chunks]
    return [sequence], None


def _text(row: Row, tokenizer: Tokenizer, by_kind: bool) -> TextSequence:
    """Plain text. A BOS or EOS spelled at its ends is that token: it is neither doubled nor
    escaped.
    """
    bos, eos = (tokenizer.special.get(name, "") for name in ("bos_token", "eos_token"))
    begins = tokenizer.adds_bos or (bool(bos) and row.text.startswith(bos))
    text = row.text.removeprefix(bos).removesuffix(eos)
    own = [("text", row.weight)] if by_kind else []
    chunks = [(text, row.weight)]
    return TextSequence(chunks, eos=True, alone=True, bos=begins, context=1, own=own)


def _tokens(row: Row, tokenizer: Tokenizer, by_kind: bool) -> TokenSequence:
    ids, size = np.array(row.ids, dtype=np.int64), tokenizer.vocab_size
    bad = np.flatnonzero((ids < 0) | (ids >= size))
    if len(bad):
        raise RowError(
            f"input_ids[{bad[0]}] is {ids[bad[0]]}, outside the vocabulary of {size:,} tokens"
        )
    weights = np.array([product(weight, row.weight) for weight in row.weights], np.float32)
    kinds = None
    if by_kind:
        kinds = np.where(weights != 0, KINDS.index("output"), 0).astype(np.uint8)
    return TokenSequence(ids.astype(np.int32), weights, kinds=kinds, spans=runs(weights))
