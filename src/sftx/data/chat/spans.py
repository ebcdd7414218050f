"""From texts with a weight each to tokens with a weight each.

Text between two added tokens is tokenised independently of what stands around it. So a text is cut
at its added tokens, each piece is tokenised once, and the tokens of the text are those of its
pieces, one after another.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sftx.data.chat.stretches import with_marks, with_weights, within
from sftx.data.chat.text_sequence import TextSequence
from sftx.data.tokenizer import Letters, Tokenizer
from sftx.data.truncation import TokenSequence
from sftx.types import Float32, Int32, joined_notes

APART = "prompt and output tokenised apart"
_REMEMBERED = 20_000  # pieces
_SHORT = 100  # characters of a piece worth remembering beyond its batch
_ID_BYTES = np.dtype(np.int32).itemsize
_NO_LETTERS: Letters = np.zeros((0, 2), np.int64)


@dataclass(slots=True)
class _Pieces:
    """A text cut at its added tokens: every second piece is one of these, the others are the text
    between them.

    `raw` is the text as it stands; in `pieces` the white space that a token takes with it is gone.
    `ids` holds the tokens of each piece, as bytes of int32.
    """

    raw: list[str]
    pieces: list[str]
    mark: str
    ids: list[bytes] = field(default_factory=list[bytes])


class SpanTokenizer:
    """Texts to token sequences, with one call of the tokenizer for almost all text of a batch.

    `escape`: special tokens spelled in chunks that stand alone stay ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer, escape: bool):
        self._tokenizer = tokenizer
        self._escape = escape
        added = tokenizer.backend.get_added_tokens_decoder()
        self._added = {token.content: _bytes([i]) for i, token in added.items()}
        self._lstrip = {token.content for token in added.values() if token.lstrip}
        self._rstrip = {token.content for token in added.values() if token.rstrip}
        # The ids of pieces that begin a text, and of pieces that stand behind another.
        self._first: dict[str, bytes] = {"": b""}
        self._inside: dict[str, bytes] = {"": b"", **self._added}
        splitting = tokenizer.splitting.pattern
        control = tokenizer.control.pattern
        self._split = re.compile(f"({splitting})").split
        # In a marked text every special token is the template's own, however the tokenizer matches
        # it.
        self._split_marked = re.compile(f"({splitting}|{control})").split

    def sequences(self, rows: Sequence[Sequence[TextSequence]]) -> list[list[TokenSequence]]:
        """The token sequences of the text sequences of each row."""
        cut: list[_Pieces] = []
        alone: list[str] = []
        for row in rows:
            for each in row:
                if each.alone:
                    alone += [chunk for chunk, _ in each.chunks]
                else:
                    cut.append(self._cut(each.text, each.mark))
        self._tokenise(cut)
        pieces = iter(cut)
        ids = iter(self._tokenizer.encode_batch(alone, plain=self._escape))
        results: list[list[TokenSequence]] = []
        for row in rows:
            found: list[TokenSequence] = []
            for each in row:
                if each.alone:
                    chunks = [next(ids) for _ in each.chunks]
                    found.append(self._of_chunks(each, chunks))
                else:
                    found += self._of_text(each, next(pieces))
            results.append(found)
        self._forget()
        return results

    def _cut(self, text: str, mark: str) -> _Pieces:
        split = self._split_marked if mark else self._split
        raw = split(text)
        pieces = raw
        if self._lstrip or self._rstrip:
            pieces = list(raw)
            for k in range(1, len(raw), 2):
                if raw[k] in self._lstrip:
                    pieces[k - 1] = pieces[k - 1].rstrip()
                if raw[k] in self._rstrip:
                    pieces[k + 1] = pieces[k + 1].lstrip()
        return _Pieces(raw, pieces, mark)

    def _tokenise(self, cut: Sequence[_Pieces]) -> None:
        """Find the tokens of all pieces of a batch, those of the pieces that are not known yet in
        one call.
        """
        texts: list[_Pieces] = []
        for text in cut:
            if text.mark:  # marks are rare
                text.ids = self._ids_marked(text.pieces, text.mark)
            else:
                texts.append(text)
        beginnings = [text.pieces[0] for text in texts]
        self._learn(beginnings, inside=False)
        others = [piece for text in texts for piece in text.pieces[1:]]
        self._learn(others, inside=True)
        for text in texts:
            text.ids = self._known_ids(text.pieces, inside=False)

    def _known(self, inside: bool) -> dict[str, bytes]:
        return self._inside if inside else self._first

    def _learn(self, pieces: Iterable[str], inside: bool) -> None:
        """Tokenise those of the pieces that are not known."""
        known = self._known(inside)
        new = [piece for piece in dict.fromkeys(pieces) if piece not in known]
        if new:
            found = self._tokenizer.encode_batch(new, inside=inside)
            for piece, ids in zip(new, found, strict=True):
                known[piece] = ids.tobytes()

    def _known_ids(self, pieces: Sequence[str], inside: bool) -> list[bytes]:
        """The tokens of the pieces of one text, which begins there or stands `inside` another."""
        ids = [self._known(inside)[pieces[0]]]
        ids += map(self._inside.__getitem__, pieces[1:])
        return ids

    def _ids_marked(self, pieces: Sequence[str], mark: str, inside: bool = False) -> list[bytes]:
        """The same of pieces in which `mark` stands inside each special token that is meant as
        ordinary text.
        """
        ids: list[bytes] = []
        for k, piece in enumerate(pieces):
            plain = piece.replace(mark, "")
            if k % 2:
                ids.append(self._added[piece])
            elif plain:
                found = self._tokenizer.encode(plain, plain=True, inside=inside or k > 0)
                ids.append(_bytes(found))
            else:
                ids.append(b"")
        return ids

    def _ids_of(self, text: str, mark: str, inside: bool) -> bytes:
        """The tokens of a text by itself, or `inside` another one."""
        pieces = self._cut(text, mark).pieces
        if mark:
            return b"".join(self._ids_marked(pieces, mark, inside))
        self._learn(pieces[:1], inside)
        self._learn(pieces[1:], inside=True)
        return b"".join(self._known_ids(pieces, inside))

    def _forget(self) -> None:
        """Forget the pieces of a batch; short ones recur (the headers of turns) and are kept for
        the next one.
        """
        for known in (self._first, self._inside):
            kept = {piece: ids for piece, ids in known.items() if len(piece) <= _SHORT}
            known.clear()
            if len(kept) <= _REMEMBERED:
                known.update(kept)
            known[""] = b""
        self._inside.update(self._added)

    def _of_text(self, sequence: TextSequence, cut: _Pieces) -> list[TokenSequence]:
        """Find the outputs of a sequence in the tokens of its whole text.

        Where the tokenizer merges letters across the border of a chunk, prompt and output are
        tokenised apart, as in serving, and the next turn begins a sequence of its own.
        """
        borders = self._borders(sequence, cut)
        if borders is None:
            return self._apart(sequence)
        everything = b"".join(cut.ids) + self._eos(sequence)
        borders.append(_count(everything))
        served = self._served(everything, borders, sequence.weights, sequence.note)
        if sequence.own:
            letters = self._letters(cut, inside=False)
            served = with_weights(served, borders, sequence.own, sequence.stretches, letters)
        return [served]

    def _borders(self, sequence: TextSequence, cut: _Pieces) -> list[int] | None:
        """At which token of the text each chunk begins; None where a token lies across the border
        of two chunks.
        """
        ends = list(itertools.accumulate(map(len, cut.raw)))  # in characters
        sizes = [0, *itertools.accumulate(map(len, cut.ids))]  # in bytes
        borders = [0]
        at = 0
        for chunk, _ in sequence.chunks[:-1]:
            at += len(chunk)
            k = bisect.bisect_left(ends, at)  # the piece that the border lies in or ends
            if at == ends[k]:
                borders.append(sizes[k + 1] // _ID_BYTES)
                continue
            head = cut.raw[k][: at - ends[k]]  # without what stands behind the border
            if k and cut.raw[k - 1] in self._rstrip:
                head = head.lstrip()
            head_ids = self._ids_of(head, sequence.mark, inside=k > 0)
            if not cut.ids[k].startswith(head_ids):
                return None
            borders.append((sizes[k] + len(head_ids)) // _ID_BYTES)
        return borders

    def _letters(self, cut: _Pieces, inside: bool) -> Letters:
        """The characters of each token of a text, as (begin, end)."""
        found = [_NO_LETTERS]
        at = 0
        for k, raw in enumerate(cut.raw):
            piece = cut.pieces[k]
            end = at + len(raw)
            if k % 2:
                found.append(np.array([[at, end]]))
            elif piece:
                begin = at + raw.index(piece)
                found.append(begin + self._letters_of_piece(piece, cut.mark, inside or k > 0))
            at = end
        return np.concatenate(found)

    def _letters_of_piece(self, piece: str, mark: str, inside: bool) -> Letters:
        if not mark:
            return self._tokenizer.letters(piece, inside=inside)
        plain = piece.replace(mark, "")
        letters = self._tokenizer.letters(plain, plain=True, inside=inside)
        return with_marks(letters, piece, mark)

    def _apart(self, sequence: TextSequence) -> list[TokenSequence]:
        """Prompt and output tokenised apart, each output in a sequence of its own."""
        sequences: list[TokenSequence] = []
        text = ""
        counted = 0  # characters of the text so far whose stretches count
        note = joined_notes(sequence.note, APART)
        last = len(sequence.chunks) - 1
        for i, (chunk, weight) in enumerate(sequence.chunks):
            before = text
            text += chunk
            if not weight:
                continue
            prompt = self._ids_of(before, sequence.mark, inside=False)
            output = self._ids_of(chunk, sequence.mark, inside=True)
            if i == last:
                output += self._eos(sequence)
            everything = prompt + output
            borders = [0, _count(prompt), _count(everything)]
            served = self._served(everything, borders, [0.0, weight], note)
            if sequence.own:
                own = [("context", 0.0), sequence.own[i]]
                stretches = within(sequence.stretches, counted, len(text))
                letters = self._letters_apart(before, chunk, sequence.mark)
                served = with_weights(served, borders, own, stretches, letters)
                counted = len(text)
            sequences.append(served)
        return sequences

    def _letters_apart(self, text: str, chunk: str, mark: str) -> Letters:
        prompt = self._letters(self._cut(text, mark), inside=False)
        output = self._letters(self._cut(chunk, mark), inside=True)
        return np.concatenate([prompt, output + len(text)])

    def _eos(self, sequence: TextSequence) -> bytes:
        eos = self._tokenizer.eos_id
        if not sequence.eos or eos is None:
            return b""
        return _bytes([eos])

    def _served(
        self, everything: bytes, borders: list[int], weights: list[float], note: str
    ) -> TokenSequence:
        """A sequence of these tokens, whose chunks end at the `borders`."""
        ids = np.frombuffer(everything, np.int32)
        begins = len(ids) > 0 and ids[0] == self._tokenizer.bos_id
        bos = self._tokenizer.bos_id if begins else None
        targets, spans = _targets(borders, weights)
        return TokenSequence(ids, targets, note, spans=spans, bos=bos, begins_with_bos=begins)

    def _of_chunks(self, sequence: TextSequence, chunks: list[Int32]) -> TokenSequence:
        """Chunks tokenised one by one, with BOS and EOS as the sequence says."""
        weights = sequence.weights
        own = sequence.own
        letters = self._letters_of_chunks(sequence)
        eos = np.frombuffer(self._eos(sequence), np.int32)
        chunks[-1] = np.append(chunks[-1], eos)
        bos = self._bos(sequence)
        begins = sequence.bos
        if begins is None:  # only before a target
            begins = bool(_first_weight(chunks, weights))
        if bos is not None and begins:
            chunks.insert(0, np.array([bos], np.int32))
            weights.insert(0, 0.0)
            own = [("context", 0.0), *own]
            letters = np.concatenate([np.zeros((1, 2), np.int64), letters])
        borders = [0, *itertools.accumulate(map(len, chunks))]
        targets, spans = _targets(borders, weights)
        made = TokenSequence(
            np.concatenate(chunks),
            targets,
            sequence.note,
            spans=spans,
            bos=None if sequence.bos is False else bos,
            begins_with_bos=bool(sequence.bos),
            context=sequence.context,
        )
        if not sequence.own:
            return made
        return with_weights(made, borders, own, sequence.stretches, letters)

    def _bos(self, sequence: TextSequence) -> int | None:
        """What begins a sequence of chunks: BOS, or EOS where there is none and it is not always
        wanted.
        """
        bos = self._tokenizer.bos_id
        if bos is None and not sequence.bos:
            return self._tokenizer.eos_id
        return bos

    def _letters_of_chunks(self, sequence: TextSequence) -> Letters:
        """The characters of each token of chunks that are tokenised one by one."""
        found = [_NO_LETTERS]
        if sequence.stretches:
            at = 0
            for chunk, _ in sequence.chunks:
                letters = self._tokenizer.letters(chunk, plain=self._escape)
                found.append(letters + at)
                at += len(chunk)
        return np.concatenate(found)


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _count(ids: bytes) -> int:
    """How many tokens the bytes hold."""
    return len(ids) // _ID_BYTES


def _targets(
    borders: list[int], weights: list[float]
) -> tuple[Float32, tuple[tuple[int, int], ...]]:
    """The weight of each token, and the spans of the outputs; chunks end at the `borders`."""
    array = np.zeros(borders[-1], np.float32)
    spans: list[tuple[int, int]] = []
    for k, weight in enumerate(weights):
        begin = borders[k]
        end = borders[k + 1]
        if weight and begin < end:
            array[begin:end] = weight
            spans.append((begin, end))
    return array, tuple(spans)


def _first_weight(chunks: Sequence[Int32], weights: Sequence[float]) -> float:
    """The weight of the first chunk that holds a token; 0 where none does."""
    for chunk, weight in zip(chunks, weights, strict=True):
        if chunk.size:
            return weight
    return 0.0
