"""How llama.cpp cuts text by a vocabulary of SentencePiece: an own reading of the scores, without the
merges that other readers make of them.
"""

from __future__ import annotations

import re
from itertools import pairwise

from sftx.gguf.vocabulary import CONTROL, SPACE, UNKNOWN, USER_DEFINED, Vocabulary


def ids_of_pieces(vocabulary: Vocabulary, text: str) -> list[int]:
    """The ids of `text`, in which special tokens may be spelled; none is put before or after it."""
    at = {token: number for number, token in enumerate(vocabulary.tokens)}
    whole = [
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    pattern = "|".join(re.escape(token) for token in sorted(whole, key=len, reverse=True))
    ids: list[int] = []
    for part in re.split(f"({pattern})", text) if pattern else [text]:
        if part in whole:
            ids.append(at[part])
        elif part:
            spaced = (" " if vocabulary.adds["space"] else "") + part
            ids += _merged(vocabulary, at, spaced.replace(" ", SPACE))
    return ids


def _merged(vocabulary: Vocabulary, at: dict[str, int], text: str) -> list[int]:
    """Join the two neighbours whose whole has the best score, the first of several, until none is a
    token; what is none then is written byte by byte.
    """
    pieces = list(text)
    while True:
        joined = ["".join(pair) for pair in pairwise(pieces)]
        known = [(-vocabulary.scores[at[each]], n) for n, each in enumerate(joined) if each in at]
        if not known:
            break
        _, number = min(known)
        pieces[number : number + 2] = [joined[number]]
    ids: list[int] = []
    unknown = vocabulary.named.get("unk_token")
    for piece in pieces:
        if piece in at:
            ids.append(at[piece])
            continue
        bytes_ = [at.get(f"<0x{byte:02X}>", unknown) for byte in piece.encode()]
        ids += [each for each in bytes_ if each is not None]
    return ids
