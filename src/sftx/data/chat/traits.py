"""What a chat template does, learned from a few probes: its stop token, its header, and how it
treats thoughts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from sftx.data.chat.conversation import REASONING, as_read
from sftx.data.chat.renderer import (
    MODEL,
    NEXT,
    THOUGHT,
    TOOLS,
    USER,
    Renderer,
    calls,
    common,
    common_length,
    ends_in_tag,
    result,
    says,
    says_calls,
)
from sftx.data.chat.thoughts import close_tag, open_tag, opening_of
from sftx.data.tokenizer import Tokenizer

Switch = dict[str, bool]
"""A setting of a template that turns thoughts on or off; {} for none."""
_BEGINS = re.compile("start|begin|user|assistant|chatbot|system", re.IGNORECASE)
"""In the names of tokens that open a turn."""
_SWITCHES = ("enable_thinking", "thinking", "enable_reasoning")
_ABOUT_THOUGHTS = re.compile(r"\b\w*(?:think|reason)\w*\b")
_QUESTION, _ANSWER = says("user", USER), says("assistant", MODEL)
_THOUGHTFUL = as_read({**_ANSWER, "reasoning_content": THOUGHT, "reasoning": THOUGHT})


@dataclass(frozen=True, slots=True)
class Ending:
    """How a plain output ends: its stop token, if there is one; the text the template writes after
    the output; the text to add where a template writes the stop token only before a next turn.
    """

    stop: str | None
    written: str
    unwritten: str = ""


class Traits:
    """What the template of `renderer` does. Each trait is found when it is asked for the first
    time.
    """

    def __init__(self, renderer: Renderer, tokenizer: Tokenizer):
        self.renderer = renderer
        self.tokenizer = tokenizer
        self._probe = renderer.probe
        self._source = renderer.source

    @cached_property
    def _prompt(self) -> str:
        """The prompt for the answer to one plain question; "" if the template refuses it."""
        return self._probe(_QUESTION, generate=True) or ""

    @cached_property
    def _full(self) -> str:
        """The text of one plain question and its answer."""
        return self._probe(_QUESTION, _ANSWER) or ""

    @cached_property
    def header(self) -> str:
        """What a prompt writes before an answer, without a thought that it opens; "" if it writes
        nothing.
        """
        asked = self._probe(_QUESTION) or ""
        written = self._prompt[len(common(self._prompt, asked)) :]
        opening, _ = opening_of(self._prompt)
        return written.removesuffix(opening)

    @cached_property
    def ending(self) -> Ending:
        """How a plain output ends.

        The stop token is one of the special tokens that directly follow the content: one at which
        generation stops, if it is known, else the last of those that also follow it when the
        conversation goes on.
        """
        written = _behind_answer(self._full)
        later = self._probe(_QUESTION, _ANSWER, says("user", NEXT)) or ""
        between = _behind_answer(later).rpartition(NEXT)[0]
        stop = self._stop(written, between)
        if stop is not None:
            return Ending(stop, written)
        closing = _without_header(between, self._full[: self._full.find(USER)])
        stop = self._stop(closing, closing)
        first = self.tokenizer.control.search(between)
        if stop is None and first and self._stops(first.group()):
            stop = first.group()
            closing = between
        if stop is not None:
            return Ending(stop, written, closing[: closing.find(stop) + len(stop)])
        return Ending(None, written)

    @cached_property
    def unwritten_after_call(self) -> str:
        """`Ending.unwritten` for a tool call, behind which a result stands and not a user."""
        turns = _QUESTION, says_calls(calls({"qz": MODEL}))
        text = self._probe(*turns, tools=TOOLS) or ""
        newest = text.rpartition(MODEL)[2]
        text = self._probe(*turns, result(NEXT), tools=TOOLS) or ""
        later = text.rpartition(MODEL)[2]
        if later.startswith(newest):
            first = self.tokenizer.control.search(later, len(newest))
            if first and self._stops(first.group()):
                return later[len(newest) : first.end()]
        return self.ending.unwritten

    def _stops(self, token: str) -> bool:
        return self.tokenizer.backend.token_to_id(token) in self.tokenizer.stop_ids

    def _stop(self, text: str, between: str) -> str | None:
        """The stop token among the first special tokens of `text`."""
        found = self._first_tokens(text)
        known = [token for token in found if self._stops(token)]
        if known:
            return known[0]
        lasting = [token for token in found if token in between]
        candidates = lasting or found
        if not candidates:
            return None
        return candidates[-1]

    def _first_tokens(self, text: str) -> list[str]:
        """The first special tokens of a text with nothing between them, up to one that opens a
        turn.
        """
        found: list[str] = []
        end = 0
        for match in self.tokenizer.control.finditer(text):
            if found and (match.start() > end or _BEGINS.search(match.group())):
                break
            found.append(match.group())
            end = match.end()
        return found

    @cached_property
    def thought_tag(self) -> str:
        """The tag of a thought that the prompt leaves open; "" if it opens none."""
        return open_tag(self._prompt)

    @cached_property
    def switches(self) -> dict[bool, Switch]:
        """The template's own setting that lets an answer begin with a thought (True) or not
        (False); {} if none.
        """
        return {thinking: self._switch(thinking) for thinking in (True, False)}

    def _switch(self, thinking: bool) -> Switch:
        for key in _SWITCHES:
            if not re.search(rf"\b{key}\b", self._source):
                continue
            switch = {key: thinking}
            prompt = self._probe(_QUESTION, generate=True, switch=switch)
            if not prompt or prompt == self._prompt:
                continue
            if thinking or not open_tag(prompt):
                return switch
        return {}

    def closing(self, tag: str) -> str:
        """The text between a thought and the answer: the template's own, else the usual one."""
        full = self._probe(_QUESTION, _THOUGHTFUL) or ""
        closing = close_tag(tag)
        behind_thought = full.partition(THOUGHT)[2]
        between = behind_thought.partition(MODEL)[0]
        if closing in between:
            begun = self._full[: self._full.rfind(MODEL)]
            before_every_answer = begun.removeprefix(common(begun, self._prompt))
            return between.removesuffix(before_every_answer)
        has_line = f"{tag}\n" in self._prompt
        return f"\n{closing}\n\n" if has_line else closing

    def closed_at_once(self, opening: str, tag: str) -> str:
        """What closes a thought just opened: as the template writes an empty thought, else the
        usual closing.
        """
        source = self._source.replace("\\n", "\n")
        written = re.search(rf"{re.escape(tag)}\s*{re.escape(close_tag(tag))}\s*(?=['\"])", source)
        if written and written.group().startswith(opening):
            return written.group()[len(opening) :]
        return self.closing(tag)

    @cached_property
    def keeps_thoughts(self) -> Switch:
        """A setting of the template with which it writes the thought of an answer; {} if it has
        none.
        """
        named = set(_ABOUT_THOUGHTS.findall(self._source)) - {*REASONING}
        for key in sorted(named | {*_SWITCHES}):
            for value in (True, False):
                switch = {key: value}
                text = self._probe(_QUESTION, _THOUGHTFUL, switch=switch) or ""
                if THOUGHT in text:
                    return switch
        return {}


def _behind_answer(text: str) -> str:
    """What stands behind the answer of the probe; "" where the template leaves that out."""
    if MODEL not in text:
        return ""
    return text.rpartition(MODEL)[2]


def _without_header(between: str, before: str) -> str:
    """The text between two turns without the text `before` every user's turn; whole tags only."""
    end = len(between) - common_length(between[::-1], before[::-1])
    if ends_in_tag(between[:end]):
        rest = re.search(r"[>\]]", between[end:])
        assert rest is not None
        end += rest.end()
    return between[:end]
