"""Thought and content told apart, however the text comes in bits."""

from __future__ import annotations

import random

import pytest

from sftx.talk.assistant import StopTexts
from sftx.talk.thought_stream import ThoughtStream

# text of the answer, the tag the prompt has opened, the thought, the content
CASES = [
    ("Paris.", "", "", "Paris."),
    ("<think>\nLet me see.\n</think>\n\nParis.", "", "Let me see.", "Paris."),
    ("\n<think>\n\n</think>\n\nParis.", "", "", "Paris."),
    ("Let me see.\n</think>\n\nParis.", "<think>", "Let me see.", "Paris."),
    ("never closed", "<think>", "never closed", ""),
    ("a < b and [c] <thing> d", "", "", "a < b and [c] <thing> d"),
    ("<b>bold</b>", "", "", "<b>bold</b>"),
    ("< 5", "", "", "< 5"),
    ("[1, 2]", "", "", "[1, 2]"),
    ("<", "", "", "<"),
    ("[THINK]hm[/THINK]ok", "", "hm", "ok"),
    ("<|channel>thought\nhm<channel|>ok", "", "hm", "ok"),
    ("Here are my reasoning steps:\nhm[BEGIN FINAL RESPONSE]\nok", "", "hm", "ok"),
    ("Here are my keys", "", "", "Here are my keys"),
    ("</thi nk> not closed </think>yes", "<think>", "</thi nk> not closed", "yes"),
    ("I say <think>x</think>", "", "", "I say <think>x</think>"),
    ("  two spaces stay", "", "", "  two spaces stay"),
    ("", "", "", ""),
    ("", "<think>", "", ""),
]


def _split(text: str, tag: str, cuts: list[int]) -> tuple[str, str]:
    stream = ThoughtStream(tag)
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces += stream.feed(text[start:end])
    pieces += stream.end()
    assert all(piece.text for piece in pieces)
    kinds = [piece.kind for piece in pieces]
    assert kinds == sorted(kinds, reverse=True), "a thought stands before the content"
    thought = "".join(piece.text for piece in pieces if piece.kind == "thought")
    return thought, "".join(piece.text for piece in pieces if piece.kind == "content")


@pytest.mark.parametrize(("text", "tag", "thought", "content"), CASES)
def test_thought_and_content(text: str, tag: str, thought: str, content: str) -> None:
    assert _split(text, tag, []) == (thought, content)
    assert _split(text, tag, list(range(1, len(text)))) == (thought, content), "letter by letter"
    rng = random.Random(text)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(text) + 1), min(3, len(text))))
        assert _split(text, tag, cuts) == (thought, content), cuts


def test_content_is_shown_as_soon_as_it_can_be_no_tag() -> None:
    stream = ThoughtStream()
    assert stream.feed("Paris")[0].text == "Paris"
    stream = ThoughtStream("<think>")
    assert stream.feed("so </th")[0].text == "so"


def test_stop_texts() -> None:
    for size in (1, 2, 5, 100):
        stops = StopTexts(["END", "\n\n"])
        text, shown = "one E two EN three\nfour END five", ""
        for start in range(0, len(text), size):
            shown += stops.feed(text[start : start + size])
        assert shown == "one E two EN three\nfour "
        assert stops.found
        assert stops.rest() == ""
    stops = StopTexts(["END"])
    assert stops.feed("one EN") == "one "
    assert (stops.rest(), stops.found) == ("EN", False)
    assert StopTexts([]).feed("all of it") == "all of it"
