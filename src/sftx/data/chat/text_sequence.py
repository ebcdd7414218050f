"""Turns as texts with a weight each: what shares a sequence, and what begins one of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sftx.data.chat.answer import Turn
from sftx.data.chat.stretches import Stretch
from sftx.types import joined_notes


@dataclass(slots=True)
class TextSequence:
    """One sequence as text: chunks, each with its weight; `eos` follows the last one.

    `alone`: each chunk is tokenised by itself. Otherwise the chunks are one text as a server would
    send it, context (weight 0) and output in turn. `mark` stands inside special tokens that are
    meant as ordinary text. `bos`: a BOS comes first (for chunks alone): always, never, or only
    before a target (None).

    `own`: with `data.weights`, the kind of each chunk and what its tokens count in the end, where
    none of the `stretches` contains them.
    """

    chunks: list[tuple[str, float]]
    eos: bool = False
    alone: bool = False
    mark: str = ""
    bos: bool | None = False
    context: int | None = None
    note: str = ""
    own: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    stretches: list[Stretch] = field(default_factory=list[Stretch])

    @property
    def text(self) -> str:
        """All chunks, one after another."""
        return "".join([chunk for chunk, _ in self.chunks])

    @property
    def weights(self) -> list[float]:
        """The weight of each chunk."""
        return [weight for _, weight in self.chunks]


def text_sequences(
    turns: Sequence[Turn], weights: Sequence[float], mark: str = ""
) -> list[TextSequence]:
    """Turns whose prompt continues the text so far share a sequence; each other one begins a
    sequence of its own.
    """
    found: list[TextSequence] = []
    text = ""
    for turn, weight in zip(turns, weights, strict=True):
        if found and not found[-1].eos and turn.prompt.startswith(text):
            sequence = found[-1]
            sequence.chunks.append((turn.prompt[len(text) :], 0.0))
        else:
            sequence = TextSequence([(turn.prompt, 0.0)], mark=mark)
            found.append(sequence)
        sequence.chunks.append((turn.output, weight))
        sequence.eos = not turn.ends
        if turn.note and turn.note not in sequence.note:
            sequence.note = joined_notes(sequence.note, turn.note)
        text = turn.prompt + turn.output
    return found
