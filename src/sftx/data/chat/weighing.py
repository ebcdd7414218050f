"""`data.weights`: what the content of a prompt's turn counts, and a thought apart from its answer.

A content is found by rendering the prompt once more, with a mark around every content: what stands
between the marks is the content as the template writes it, and without the marks the text must be
that of the prompt, to the letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeAlias

from sftx.data.chat.answer import Turn
from sftx.data.chat.conversation import ChatMessage, Conversation, reasoning_of
from sftx.data.chat.stretches import Stretch
from sftx.data.chat.text_sequence import TextSequence
from sftx.data.chat.thoughts import block_in
from sftx.data.chat.turns import ChatTemplate
from sftx.types import RowError

LEFT_OUT = "weighted turn left out by the template"
_PLANES = (0x100000, 0xF0000)  # of characters for private use: two for each message
_MOST = 0x7FFF  # messages
_Places: TypeAlias = dict[int, list[tuple[int, int]]]
"""Where the content of each message stands, as (begin, end) in characters."""


class _Marks(NamedTuple):
    """The characters that stand around contents: two for each message, from `first` on."""

    first: int

    def pattern(self) -> re.Pattern[str]:
        return re.compile(f"([{chr(self.first)}-{chr(self.first + 0xFFFD)}])")

    def around(self, message: ChatMessage, number: int, inside: bool) -> ChatMessage:
        """The message with marks around its content, or `inside` the white space that it begins and
        ends with: a template may trim it.
        """
        content = message["content"]
        core = content.strip() if inside else content
        if not core:
            return message
        lead, _, rest = content.partition(core)
        begin = chr(self.first + 2 * number)
        end = chr(self.first + 2 * number + 1)
        return {**message, "content": f"{lead}{begin}{core}{end}{rest}"}


def set_weights(
    sequences: Sequence[TextSequence],
    turns: Sequence[Turn],
    conversation: Conversation,
    template: ChatTemplate,
) -> list[str]:
    """Say in each sequence what its chunks and contents count. Returns notes for the ledger.

    A content that stands in several sequences counts in the first of them. `RowError` if one that
    should count cannot be told apart from what the template writes.
    """
    shares = conversation.shares
    counted: set[int] = set()
    first = 0
    for sequence in sequences:
        count = len(sequence.chunks) // 2
        own = turns[first : first + count]
        trained = conversation.trained[first : first + count]
        first += count
        for turn, t in zip(own, trained, strict=True):
            _add_answer(sequence, turn, conversation, t)
        found = _Contents(template, conversation, trained[-1], own[-1]).find()
        for number, places in found.items():
            weight = 0.0 if number in counted else shares[number].content
            for begin, end in places:
                sequence.stretches.append(Stretch(begin, end, shares[number].kind, weight))
        counted.update(number for number, places in found.items() if places)
    for number in set(range(conversation.trained[-1])) - counted:
        if shares[number].content and _says(conversation, number):
            return [LEFT_OUT]
    return []


def _add_answer(sequence: TextSequence, turn: Turn, conversation: Conversation, t: int) -> None:
    """Say what the prompt and the output of turn `t` count, and the thought in it."""
    share = conversation.shares[t]
    sequence.own += [("context", 0.0), (share.kind, share.answer)]
    begin = len(turn.prompt)
    if thought := _thought(turn, conversation.messages[t]):
        a, b = thought
        sequence.stretches.append(Stretch(begin + a, begin + b, "reasoning", share.thought))


def set_weights_joined(sequence: TextSequence, conversation: Conversation) -> None:
    """The same for turns that are joined as they are: each chunk is a turn."""
    at = 0
    for number, (chunk, _) in enumerate(sequence.chunks):
        share = conversation.shares[number]
        message = conversation.messages[number]
        sequence.own.append((share.kind, share.answer or share.content))
        thought = None
        if number in conversation.trained and message["role"] == "assistant":
            thought = block_in("", chunk, "")
        if thought:
            a, b = thought
            sequence.stretches.append(Stretch(at + a, at + b, "reasoning", share.thought))
        at += len(chunk)


def _says(conversation: Conversation, number: int) -> bool:
    return bool(conversation.messages[number]["content"].strip())


def _thought(turn: Turn, message: ChatMessage) -> tuple[int, int] | None:
    """Where an output thinks, without the tags around it."""
    if message["role"] != "assistant":
        return None
    return block_in(turn.prompt, turn.output, reasoning_of(message).strip())


class _Contents:
    """The contents of the messages before turn `t` in the prompt of that turn."""

    def __init__(
        self, template: ChatTemplate, conversation: Conversation, t: int, turn: Turn
    ) -> None:
        self._template = template
        self._conversation = conversation
        self._t = t
        self._turn = turn
        shares = conversation.shares
        self._wanted = [
            i
            for i in range(t)
            if i not in conversation.trained
            and shares[i].kind != "context"
            and _says(conversation, i)
        ]

    def find(self) -> _Places:
        """Where each content stands, in characters; nowhere if the template leaves it out."""
        together = self._in_one_rendering(self._wanted)
        if together is not None:
            return together
        found: _Places = {}
        for number in self._wanted:
            alone = self._in_one_rendering([number])
            if alone is not None:
                found |= alone
            elif self._conversation.shares[number].content:
                raise RowError(
                    f"turn {number}: the {self._template.name} rewrites the content, which cannot "
                    "be told apart from the text around it, as data.weights asks for"
                )
        return found

    def _in_one_rendering(self, numbers: Collection[int]) -> _Places | None:
        """None if the template writes marked contents otherwise."""
        if not numbers:
            return {}
        if max(numbers) >= _MOST:
            raise RowError(f"data.weights: a row may have {_MOST:,} turns")
        marks = self._marks()
        for inside in (False, True):
            messages = list(self._conversation.messages)
            for number in numbers:
                messages[number] = marks.around(messages[number], number, inside)
            if (found := self._compared(messages, marks)) is not None:
                return {number: found.get(number, []) for number in numbers}
        return None

    def _marks(self) -> _Marks:
        row = self._conversation
        text = json.dumps([row.messages, row.tools, row.kwargs], ensure_ascii=False)
        for first in _PLANES:
            if not _Marks(first).pattern().search(text):
                return _Marks(first)
        raise RowError(
            "data.weights: the text holds characters of both planes for private use, which are "
            "needed to tell its contents apart"
        )

    def _compared(self, messages: list[ChatMessage], marks: _Marks) -> _Places | None:
        """The places between the marks in the prompt; None if it is another text without them."""
        marked = self._conversation.with_messages(messages)
        render = self._template.render
        switch = self._turn.switch
        prompt = self._turn.prompt
        for end, generate in ((self._t, True), (self._t + 1, False)):
            try:
                pieces = marks.pattern().split(render(marked, end, generate, **switch))
            except RowError:
                continue
            text = "".join(pieces[::2])
            if text == prompt or (not generate and text.startswith(prompt)):
                return _between(pieces, marks, len(prompt))
        return None


def _between(pieces: list[str], marks: _Marks, length: int) -> _Places | None:
    """The stretches between the two marks of each message, up to `length` characters; None where a
    mark lacks its other. Every second piece is a mark.
    """
    open_at: dict[int, int] = {}
    found: _Places = {}
    at = 0
    for text, mark in zip(pieces[::2], pieces[1::2], strict=False):
        at += len(text)
        number, closes = divmod(ord(mark) - marks.first, 2)
        if not closes:
            open_at[number] = at
        elif number not in open_at:
            return None
        else:
            begin = open_at.pop(number)
            if begin < at <= length:
                found.setdefault(number, []).append((begin, at))
    return None if open_at else found
