"""All prompts and outputs of a plain conversation from one rendering, for templates whose habits allow it.

Rendering every turn's prompt and answer costs two renderings per turn. For conversations of plain alternating turns
most templates write `head U gap A between U gap A ...`; `Shortcut` learns these texts from the turns of one probe, and
takes a conversation apart only if its rendering is, to the letter, made of them and of the row's own contents. Anything
else, and every template that the probe does not fit, takes the long way. `Encoder` also compares both ways by sample.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

from sftx.data.conversation import REASONING, Conversation
from sftx.data.habits import MODEL, NEXT, TOOLS, USER, calls, result, says
from sftx.data.template import ChatTemplate, Turn
from sftx.types import RowError

_PLAIN = {"role", "content"}
# Contents in which a template may see a thought: these are left to the long way.
_THOUGHT = re.compile(r"(?i:think\w*\|?>|thought\w*\|?>|reason\w*\|?>|<\|?channel)|\[/?THINK|\[BEGIN FINAL RESPONSE")


@dataclass(frozen=True, slots=True)
class Shortcut:
    """The constant texts of a template's plain turns.

    In a rendering: `gap` between user and answer, `between` from the answer to the next user, `last_gap` and
    `last_close` around the newest answer. In serving: `served` from the user to the end of the prompt, then `lead`,
    the content and `close`. `joined`: a prompt continues the text of the turns before it.
    """

    gap: str
    between: str
    last_gap: str
    last_close: str
    served: str
    lead: str
    close: str
    ends: bool
    note: str
    switch: dict[str, Any]
    system: bool
    joined: bool
    header: str = ""  # the end of every prompt, where turns with tool calls can be told apart by it
    stops: tuple[str, ...] = ()  # what ends such turns

    def turns(self, template: ChatTemplate, conversation: Conversation) -> list[Turn] | None:
        """The trained turns, as `ChatTemplate.turn` would give them; None if the conversation is not plain."""
        if any(conversation.messages[t]["role"] != "assistant" for t in conversation.trained):
            return None
        pairs = self._pairs(conversation)
        if pairs is None and not (self.header and _thoughtless(conversation)):
            return None
        try:
            text = template.render(conversation, conversation.trained[-1] + 1, False, **self.switch)
        except RowError:
            return None  # let the long way say what is wrong
        if pairs is None:
            return self._by_headers(text, conversation)
        borders = self._take_apart(text, pairs)
        if borders is None:
            return None
        result = []
        first = len(conversation.messages[: conversation.trained[-1] + 1]) - 2 * len(pairs)
        for t in conversation.trained:
            user_end, begin, end = borders[(t - first) // 2]
            output = f"{self.lead}{text[begin:end]}{self.close}"
            result.append(Turn(text[:user_end] + self.served, output, self.ends, self.note, self.switch))
        return result

    def _pairs(self, conversation: Conversation) -> list[tuple[str, str]] | None:
        """The (user, answer) contents up to the last trained turn, if all is plain."""
        messages = conversation.messages[: conversation.trained[-1] + 1]
        if conversation.tools or any(message.keys() != _PLAIN for message in messages):
            return None
        if messages[0]["role"] == "system":
            if not self.system:
                return None
            messages = messages[1:]
        users, answers = messages[::2], messages[1::2]
        plain = len(users) == len(answers) > 0
        if not plain or any(m["role"] != "user" for m in users) or any(m["role"] != "assistant" for m in answers):
            return None
        pairs = [(user["content"], answer["content"]) for user, answer in zip(users, answers, strict=True)]
        if any(_may_think(answer) or not answer.strip() for _, answer in pairs):
            return None
        if not self.joined and any(answer != answer.strip() for _, answer in pairs):
            return None  # the newest answer may be trimmed otherwise than earlier ones
        return pairs

    def _by_headers(self, text: str, conversation: Conversation) -> list[Turn] | None:
        """The turns of a conversation with tool calls: each begins at a header and ends at a stop token.

        No content can spell either, for special tokens in contents are marked; if they are not, the count tells.
        Where prompts do not continue each other, only the newest turn has its lead in the rendering.
        """
        lead = "" if self.joined else self.lead
        answers = [t for t in range(conversation.trained[-1] + 1) if conversation.messages[t]["role"] == "assistant"]
        begins = [match.end() for match in re.finditer(re.escape(self.header), text)]
        if len(begins) != len(answers):
            return None
        result = []
        for t, begin, limit in zip(answers, begins, [*begins[1:], len(text)], strict=True):
            ends = [(at, stop) for stop in self.stops if (at := text.find(stop, begin, limit)) >= 0]
            end, stop = min(ends, default=(begin, ""))
            message = conversation.messages[t]
            names = [call["function"]["name"] for call in message.get("tool_calls", ())]
            if not stop or any(said not in text[begin:end] for said in (message["content"].strip(), *names)):
                return None
            if conversation.weights[t]:
                missing = "" if text.startswith(lead, begin) else lead
                result.append(Turn(text[:begin], missing + text[begin:end] + stop, True))
        return result

    def _take_apart(self, text: str, pairs: list[tuple[str, str]]) -> list[tuple[int, int, int]] | None:
        """For each pair: where the user's text ends, and where the answer begins and ends. None if it is not so."""
        gap = self.last_gap if len(pairs) == 1 else self.gap
        at = max(text.find(form + gap) for form in _forms(pairs[0][0]))
        if at < 0:
            return None
        borders = []
        for i, (user, answer) in enumerate(pairs):
            newest = i == len(pairs) - 1
            gap, close = (self.last_gap, self.last_close) if newest else (self.gap, self.between)
            user_end = _after(text, at, user, gap)
            if user_end is None:
                return None
            begin = user_end + len(gap)
            end = _after(text, begin, answer, close)
            if end is None:
                return None
            borders.append((user_end, begin, end))
            at = end + len(close)
        return borders if at == len(text) else None


def learn_shortcut(template: ChatTemplate, kwargs: dict[str, Any]) -> Shortcut | None:
    """The shortcut of a template with these settings of a row, if the turns of a probe fit one."""
    words = [(USER, MODEL), (NEXT, "qzfirstqz"), ("qzsecondqz", "qzthirdqz")]
    messages = [m for user, model in words for m in (says("user", user), says("assistant", model))]
    conversation = Conversation(messages, [0.0, 1.0] * 3, None, kwargs)
    try:
        turns = [template.turn(conversation, t) for t in (1, 3, 5)]
        text = template.render(conversation, 6, False, **turns[0].switch)
    except RowError:
        return None
    at = [text.find(word) for pair in words for word in pair]
    if -1 in at or sorted(at) != at or len({(turn.ends, turn.note) for turn in turns}) > 1:
        return None
    ends = [begin + len(word) for begin, word in zip(at, (word for pair in words for word in pair), strict=True)]
    lead, _, close = turns[0].output.partition(MODEL)
    joined = all(text.startswith(turn.prompt + turn.output) for turn in turns[:2])
    shortcut = Shortcut(
        gap=text[ends[0] : at[1]],
        between=text[ends[1] : at[2]],
        last_gap=text[ends[4] : at[5]],
        last_close=text[ends[5] :],
        served=turns[0].prompt[ends[0] :],
        lead=lead,
        close=close,
        ends=turns[0].ends,
        note=turns[0].note,
        switch=turns[0].switch,
        system=False,
        joined=joined,
    )
    probes = conversation, Conversation(messages[:2], [0.0, 1.0], None, kwargs)
    if not all(_agrees(shortcut, template, probe) for probe in probes):
        return None
    shortcut = _with_calls(shortcut, template, kwargs)
    with_system = replace(shortcut, system=True)
    weights = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    conversation = Conversation([says("system", "qzsystemqz"), *messages], weights, None, kwargs)
    return with_system if _agrees(with_system, template, conversation) else shortcut


def _with_calls(shortcut: Shortcut, template: ChatTemplate, kwargs: dict[str, Any]) -> Shortcut:
    """The shortcut, for conversations with tool calls too if their turns can be told apart by their headers."""
    call, answer = calls({"qz": 1}), result("qzresultqz")
    first = [says("user", USER), call, answer, says("assistant", "qzfirstqz")]
    messages = [*first, says("user", NEXT), call, answer, call, answer, says("assistant", MODEL)]
    weights = [float(message["role"] == "assistant") for message in messages]
    conversation = Conversation(messages, weights, TOOLS, kwargs)
    try:
        turns = [template.turn(conversation, t) for t in conversation.trained]
    except RowError:
        return shortcut
    ends = [template.last_added(turn.output) for turn in turns]
    common_end = commonprefix([turn.prompt[::-1] for turn in turns])[::-1]  # noqa: RUF071 (of letters)
    header = template.first_added(common_end)
    if shortcut.note or shortcut.switch or not header or None in ends:
        return shortcut
    stops = {turn.output[at[0] :] for turn, at in zip(turns, ends, strict=True) if at}
    extended = replace(shortcut, header=common_end[header[0] :], stops=tuple(sorted(stops)))
    return extended if _agrees(extended, template, conversation) else shortcut


def _thoughtless(conversation: Conversation) -> bool:
    """Whether no turn has a thought: templates treat those in too many ways."""
    messages = conversation.messages
    return not any(message.keys() & {*REASONING} or _may_think(message["content"]) for message in messages)


def _may_think(content: str) -> bool:
    """Whether a template may see a thought in a content; most hold no character that marks a tag."""
    return ("<" in content or ">" in content or "[" in content) and _THOUGHT.search(content) is not None


def _agrees(shortcut: Shortcut, template: ChatTemplate, conversation: Conversation) -> bool:
    try:
        return shortcut.turns(template, conversation) == [template.turn(conversation, t) for t in conversation.trained]
    except RowError:
        return False


def _forms(content: str) -> tuple[str, ...]:
    """A content as templates write it: as it is, or without the white space around it."""
    trimmed = content.strip()
    return (content,) if trimmed == content else (content, trimmed)


def _after(text: str, at: int, content: str, then: str) -> int | None:
    """The end of `content` (in one of its forms) at `at` with `then` behind it; None if it is not there."""
    for form in _forms(content):
        if text.startswith(form, at) and text.startswith(then, at + len(form)):
            return at + len(form)
    return None
