"""The thought of an answer and its content, told apart while the answer is being written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sftx.data.chat.tag_stream import may_begin_tag, tag_at_start
from sftx.data.chat.thoughts import close_tag

LONGEST_TAG = 40
"""Characters. What is longer and no opening tag yet is content."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some characters of an answer."""

    kind: Literal["thought", "content"]
    text: str


class ThoughtStream:
    """Takes the text of an answer bit by bit; gives it back as pieces of thought and content.

    `tag`: the opening tag of the thought in which the prompt ends; "" for none. A thought that the
    answer opens itself stands at its beginning. The tags are in no piece, nor is the white space
    around a thought. What may be the beginning of a tag is held back until more text has come.
    """

    def __init__(self, tag: str = "") -> None:
        self._tag = tag
        self._state: Literal["start", "thought", "content"] = "thought" if tag else "start"
        self._held = ""
        self._at_edge = True  # nothing of the present kind was given yet

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain now that `text` has come."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._look_for_tag()
        if self._state == "thought":
            pieces += self._thought()
        if self._state == "content":
            pieces += self._given("content", len(self._held))
        return pieces

    def end(self) -> list[Piece]:
        """The rest, when the answer has ended."""
        if self._state == "thought":
            return self._given("thought", len(self._held.rstrip()))
        return self._given("content", len(self._held))

    def _look_for_tag(self) -> None:
        begun = self._held.lstrip()
        self._tag = tag_at_start(begun)
        if self._tag:
            self._held = begun[len(self._tag) :]
            self._state = "thought"
        elif len(begun) > LONGEST_TAG or not may_begin_tag(begun):
            self._state = "content"

    def _thought(self) -> list[Piece]:
        closing = close_tag(self._tag)
        at = self._held.find(closing)
        if at < 0:
            certain = self._held[: len(self._held) - _overlap(self._held, closing)]
            return self._given("thought", len(certain.rstrip()))
        pieces = self._given("thought", len(self._held[:at].rstrip()))
        self._held = self._held.partition(closing)[2]
        self._state = "content"
        self._at_edge = True
        return pieces

    def _given(self, kind: Literal["thought", "content"], count: int) -> list[Piece]:
        """The first `count` characters held; white space at the edge of a thought is left out."""
        text = self._held[:count]
        self._held = self._held[count:]
        if self._at_edge and self._tag:
            text = text.lstrip()
        if not text:
            return []
        self._at_edge = False
        return [Piece(kind, text)]


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of a text may be the beginning of `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
