"""Scripts: sequences of texts with a weight each, and how they become tokens."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftx.data.habits import common_length
from sftx.data.length import TokenSequence
from sftx.data.template import Turn
from sftx.data.tokenizer import Tokenizer
from sftx.types import Float32, Int32

_NONE, _NO_PLACES = np.zeros(0, np.int32), np.zeros(0, np.int64)
APART = "prompt and output tokenised apart"


@dataclass(slots=True)
class Script:
    """One sequence as text: chunks, each with its weight; `eos` follows the last one.

    `alone`: each chunk is tokenised by itself. Otherwise the chunks are one text as a server would send it, context
    (weight 0) and output in turn. `mark` stands inside special tokens that are meant as ordinary text. `bos`: a BOS
    comes first (for chunks alone): always, never, or only before a target.
    """

    chunks: list[tuple[str, float]]
    eos: bool = False
    alone: bool = False
    mark: str = ""
    bos: bool | None = False  # None: only before a target
    context: int | None = None
    note: str = ""

    @property
    def text(self) -> str:
        """All chunks as one text."""
        return "".join(text for text, _ in self.chunks)


def scripts_of(turns: Sequence[Turn], weights: Sequence[float], mark: str = "") -> list[Script]:
    """Turns whose prompt continues the text so far share a sequence; each other one begins a sequence of its own."""
    scripts: list[Script] = []
    length, ends, last = 0, False, ""
    for turn, weight in zip(turns, weights, strict=True):
        if scripts and ends and len(turn.prompt) >= length and turn.prompt.startswith(last):
            script = scripts[-1]
            script.chunks.append((turn.prompt[length:], 0.0))
        else:
            script = Script([(turn.prompt, 0.0)], mark=mark)
            scripts.append(script)
        script.chunks.append((turn.output, weight))
        script.eos = not turn.ends
        script.note = turn.note or script.note
        last = turn.prompt + turn.output
        length, ends = len(last), turn.ends
    return scripts


@dataclass(slots=True)
class _Text:
    """A text on its way to tokens, and where its added tokens stand: in characters (`matches`) and in ids (`places`).

    `shared`: the added token before which text and tokens are those of the row's previous text; -1 if there is none.
    """

    text: str
    matches: list[tuple[int, int]]
    shared: int
    ids: Int32
    places: NDArray[np.int64]

    @property
    def rest(self) -> str:
        """The part that is not shared."""
        return self.text[self.matches[self.shared][0] :] if self.shared >= 0 else self.text


class Tokeniser:
    """Scripts to token sequences, with one call of the tokenizer for (almost) all text of a batch."""

    def __init__(self, tokenizer: Tokenizer, escape: bool):
        self._tokenizer = tokenizer
        self._escape = escape
        self._tails: dict[str, list[int]] = {}

    def sequences(self, rows: Sequence[Sequence[Script]]) -> list[list[TokenSequence]]:
        """The token sequences of the scripts of each row."""
        texts = [self._texts(scripts) for scripts in rows]
        parts = [chunk for scripts in rows for script in scripts if script.alone for chunk, _ in script.chunks]
        ids = iter(self._tokenizer.encode_batch([text.rest for row in texts for text in row if text.ids.size == 0]))
        part_ids = iter(self._tokenizer.encode_batch(parts, plain=self._escape))
        results = []
        for scripts, row in zip(rows, texts, strict=True):
            sequences: list[TokenSequence] = []
            remaining = iter(row)
            previous: _Text | None = None
            for script in scripts:
                if script.alone:
                    sequences.append(self._of_parts(script, [next(part_ids) for _ in script.chunks]))
                    continue
                text = next(remaining)
                if text.ids.size == 0:
                    self._fill(text, next(ids), previous)
                previous = text
                sequences += self._of_text(script, text)
            results.append(sequences)
        return results

    def _texts(self, scripts: Sequence[Script]) -> list[_Text]:
        """The texts of scripts that are not tokenised chunk by chunk; those with a mark already with their ids."""
        texts: list[_Text] = []
        for script in scripts:
            if script.alone:
                continue
            text, shared, known = script.text, -1, []
            if texts and not script.mark:  # marks are rare: they are not worth the bookkeeping
                alike = common_length(texts[-1].text, text)
                shared = bisect.bisect_right(texts[-1].matches, alike, key=lambda match: match[1]) - 1
                known = texts[-1].matches[: shared + 1]
            found = self._tokenizer.splitting.finditer(text, known[-1][1] if known else 0)
            matches = [*known, *map(re.Match.span, found)]
            made = _Text(text, matches, shared, _NONE, _NO_PLACES)
            if script.mark:
                made.ids = np.array(self._tokenizer.encode_escaped(text, script.mark), dtype=np.int32)
                made.places = self._places(made.ids)
            texts.append(made)
        return texts

    def _places(self, ids: Int32) -> NDArray[np.int64]:
        return self._tokenizer.is_splitting[ids].nonzero()[0]

    def _fill(self, text: _Text, rest: Int32, previous: _Text | None) -> None:
        """Put the tokens of a text together from those it shares with the previous one and those of its rest."""
        ids = rest
        if text.shared >= 0:
            assert previous is not None
            if len(previous.places) == len(previous.matches):
                ids = np.concatenate([previous.ids[: previous.places[text.shared]], ids])
            else:
                ids = np.array(self._tokenizer.encode(text.text), dtype=np.int32)
        text.ids, text.places = ids, self._places(ids)

    def _of_text(self, script: Script, text: _Text) -> list[TokenSequence]:
        """Find the outputs of a script in the ids of its whole text.

        Text between added tokens is tokenised independently, so a border lies as many tokens after the added token
        before it as the text between them has on its own. Where the tokenizer merges letters across a border, prompt
        and output are tokenised apart, as in serving, and the next turn begins a sequence of its own.
        """
        borders = [0]
        at = 0
        for chunk, _ in script.chunks[:-1]:
            at += len(chunk)
            first, tail = self._until(text, at, script.mark)
            if text.ids[first : first + len(tail)].tolist() != tail:  # a token lies across the border
                return self._apart(script, text)
            borders.append(first + len(tail))
        eos = self._eos(script)
        ids = np.append(text.ids, np.array(eos, np.int32)) if eos else text.ids
        return [self._served(ids, [*borders, len(ids)], [weight for _, weight in script.chunks], script.note)]

    def _eos(self, script: Script) -> list[int]:
        return [] if self._tokenizer.eos_id is None or not script.eos else [self._tokenizer.eos_id]

    def _until(self, text: _Text, at: int, mark: str) -> tuple[int, list[int]]:
        """The tokens of a text that is cut off at character `at`: so many of its own, and those that follow them."""
        k = bisect.bisect_right(text.matches, at, key=lambda match: match[1])
        if k == 0 or len(text.places) != len(text.matches):  # or the tokenizer sees others than the letters spell
            return 0, self._encode(text.text[:at], mark)
        begin, end = text.matches[k - 1]
        return int(text.places[k - 1]) + 1, self._tail(text.text[begin:at], mark) if end < at else []

    def _tail(self, text: str, mark: str) -> list[int]:
        """Ids of a text that begins with an added token, without that token. Short ones recur: headers of turns."""
        if len(text) > 100 or mark:
            return self._encode(text, mark)[1:]
        if text not in self._tails:
            if len(self._tails) > 10_000:
                self._tails.clear()
            self._tails[text] = self._encode(text, mark)[1:]
        return self._tails[text]

    def _encode(self, text: str, mark: str, inside: bool = False) -> list[int]:
        made = self._tokenizer
        return made.encode_escaped(text, mark, inside) if mark else made.encode(text, inside=inside)

    def _apart(self, script: Script, text: _Text) -> list[TokenSequence]:
        """Prompt and output tokenised apart, each output in a sequence of its own."""
        sequences, at = [], 0
        for i, (chunk, weight) in enumerate(script.chunks):
            if weight:
                first, tail = self._until(text, at, script.mark)
                output = self._encode(chunk, script.mark, inside=True)
                output += self._eos(script) if i == len(script.chunks) - 1 else []
                ids = np.concatenate([text.ids[:first], np.array([*tail, *output], np.int32)])
                note = "; ".join(filter(None, [script.note, APART]))
                sequences.append(self._served(ids, [0, first + len(tail), len(ids)], [0.0, weight], note))
            at += len(chunk)
        return sequences

    def _served(self, ids: Int32, borders: list[int], weights: list[float], note: str) -> TokenSequence:
        begins = len(ids) > 0 and ids[0] == self._tokenizer.bos_id
        bos = self._tokenizer.bos_id if begins else None
        return TokenSequence(ids, *_targets(borders, weights), bos=bos, begins_with_bos=begins, note=note)

    def _of_parts(self, script: Script, parts: list[Int32]) -> TokenSequence:
        """Chunks tokenised one by one, with BOS and EOS as the script says."""
        weights = [weight for _, weight in script.chunks]
        parts[-1] = np.append(parts[-1], np.array(self._eos(script), np.int32))
        bos = self._tokenizer.bos_id
        bos = self._tokenizer.eos_id if bos is None and not script.bos else bos
        first = next((weight for part, weight in zip(parts, weights, strict=True) if part.size), 0.0)
        if bos is not None and (script.bos or (script.bos is None and first)):
            parts, weights = [np.array([bos], np.int32), *parts], [0.0, *weights]
        ids = np.concatenate(parts)
        borders = [0, *itertools.accumulate(map(len, parts))]
        bos = None if script.bos is False else bos
        return TokenSequence(ids, *_targets(borders, weights), bos, bool(script.bos), script.context, script.note)


def _targets(borders: list[int], weights: list[float]) -> tuple[Float32, tuple[tuple[int, int], ...]]:
    """The weight of each token, and the spans of the outputs, of chunks that end at these borders."""
    array, spans = np.zeros(borders[-1], np.float32), []
    for begin, end, weight in zip(borders, borders[1:], weights, strict=False):
        if weight and begin < end:
            array[begin:end] = weight
            spans.append((begin, end))
    array[:1] = 0  # nothing stands before the first token
    return array, tuple(spans)
