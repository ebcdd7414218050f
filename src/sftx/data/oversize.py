"""Texts too long to be tokenised in one go: refused, with their size and what to do.

A tokenizer takes about a microsecond and 100 bytes of memory for each character that it must look
at together, and no less than n log n of it. By word, a text of any size is tokenised in pieces;
other tokenizers, and texts without spaces, would take minutes and many GiB for a text of 50 MB.
"""

from __future__ import annotations

from collections.abc import Iterator

from sftx.data.tokenizer import Tokenizer
from sftx.types import Row, RowError

AT_ONCE = 10_000_000  # characters: about 12 seconds and 1 GiB


def check_size(row: Row, tokenizer: Tokenizer) -> None:
    """`RowError` if a text of the row holds more than `AT_ONCE` characters that cannot be tokenised
    apart.
    """
    for field, text in _texts(row):
        if len(text) > AT_ONCE and (longest := tokenizer.longest_piece(text)) > AT_ONCE:
            why = (
                "without a space to cut at"
                if tokenizer.cuts_at_spaces
                else "(this tokenizer cuts no text apart)"
            )
            raise RowError(
                f"field {field!r} holds {longest:,} characters {why}; at most {AT_ONCE:,} are "
                "tokenised in one go. Cut "
                "the text into several rows (a document, a chapter or a paragraph each)"
            )


def _texts(row: Row) -> Iterator[tuple[str, str]]:
    yield "text", row.text
    yield from ((f"phrase {i}", phrase.text) for i, phrase in enumerate(row.phrases))
    for i, message in enumerate(row.messages):
        yield f"messages[{i}].content", message.get("content", "")
        yield f"messages[{i}].reasoning_content", message.get("reasoning_content", "")
