"""Tokenising by word: a word of the text is tokenised once and remembered.

Text repeats its words, and most time of a byte-level BPE tokenizer goes into cutting text up and
merging again what it has merged before. In the tokenizers that `tokenises_by_word` accepts, a new
piece always begins where a `WORD` does, and no piece looks beyond that place; so the ids of a text
are those of its words, one after another.
"""

from __future__ import annotations

import json
import re
from array import array
from itertools import islice
from typing import Any

import numpy as np
import tokenizers
import tokenizers.models

from sftx.types import Int32

# A word ends before a space that follows something else, and before punctuation or a new line that
# follows a letter or digit: anywhere else it goes on.
WORD = re.compile(
    r'.[^ .,;:!?()"\n]*(?:(?<![A-Za-z0-9])(?:[.,;:!?()"\n]|(?<=\s) )[^ .,;:!?()"\n]*)*', re.DOTALL
)
AT_ONCE = 1 << 18  # characters of a text, or words of a longer one
REMEMBERED, LONGEST = 200_000, 48  # words, and characters of a word worth remembering
# The cutting rules of the GPT-4, Llama 3, Qwen 2 and 3 and GPT-4o families: in all of them a match
# holds a space only as its first character, or among white space alone, holds none of .,;:!?()" or
# a new line after a letter or digit, and looks ahead only from white space.
_RULES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}N| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}N| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def tokenises_by_word(backend: tokenizers.Tokenizer) -> bool:
    """Whether the words of a text may be tokenised one by one: True only where the tokenizer's
    rules imply it.
    """
    model = backend.model
    normalizer = _state(backend.normalizer)
    return (
        isinstance(model, tokenizers.models.BPE)
        and not model.dropout
        and (normalizer is None or normalizer["type"] == "NFC")
        and _known_rule(_state(backend.pre_tokenizer))
        and not any(
            token.lstrip
            or token.rstrip
            or token.single_word
            or len(WORD.findall(token.content)) > 1
            for token in backend.get_added_tokens_decoder().values()
        )
    )


def _state(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _known_rule(cutting: dict[str, Any] | None) -> bool:
    match cutting:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:  # GPT-2's own
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": rule},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return re.sub(r"\\p\{N\}(\{1,3\})?\|", r"\\p{N}N|", rule) in _RULES
        case _:
            return False


class WordCache(dict[str, bytes]):
    """The ids of words, as bytes; of a word met for the first time they are made when it is looked
    up.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, word: str) -> bytes:
        ids = array(
            "i", self._backend.encode_batch_fast([word], add_special_tokens=False)[0].ids
        ).tobytes()
        if len(word) <= LONGEST:
            if len(self) == REMEMBERED:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, text: str) -> Int32:
        """Ids int32[T] of a text, word by word."""
        if len(text) <= AT_ONCE:
            words = WORD.findall(text)
            return np.frombuffer(b"".join(map(self.__getitem__, words)), np.int32)
        # A list of all words of a large file would take ten times its memory.
        words = (match.group() for match in WORD.finditer(text))
        parts: list[bytes] = []
        while part := b"".join(map(self.__getitem__, islice(words, AT_ONCE))):
            parts.append(part)
        return np.frombuffer(b"".join(parts), np.int32)
