"""All turns of a conversation from one rendering, for templates whose texts between the contents
are known.

Rendering every turn's prompt and answer costs two renderings per turn. Most templates write plain
turns as `head U gap A between U gap A ...`. A `Skeleton` holds these texts, learned from the turns
of a probe; a conversation is taken apart only if its rendering is, to the letter, made of them and
of the row's own contents. Conversations with tool calls are cut at the headers of their answers.
Anything else is rendered turn by turn. Which way a row goes depends on the row and the template
alone, never on other rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sftx.data.chat.answer import Turn
from sftx.data.chat.calls import has_new_escapes, lost_call
from sftx.data.chat.conversation import REASONING, ChatMessage, Conversation
from sftx.data.chat.thoughts import may_think
from sftx.data.chat.traits import Switch
from sftx.data.chat.turns import ChatTemplate
from sftx.types import RowError

_PLAIN = {"role", "content"}
# What may stand before a message of each role in a conversation that is cut at headers; None = the
# beginning.
_BEFORE: dict[str, tuple[str | None, ...]] = {
    "user": (None, "system", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("call", "tool"),
    "system": (None,),
}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The constant texts of a template's plain turns.

    In a rendering: `gap` between user and answer, `between` from the answer to the next user,
    `last_gap` and `last_close` around the newest answer. In serving: `served` from the user to the
    end of the prompt, then `lead`, the content and `close`. `joined`: a prompt continues the text
    of the turns before it. `system`: a conversation may begin with a system message. `header`: the
    end of every prompt, where turns with tool calls can be told apart by it, and `stops`: what ends
    such turns. `parallel`: a turn may hold more than one call. `interrupted`: a user may speak
    behind a result.
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
    switch: Switch
    joined: bool
    system: bool = False
    header: str = ""
    stops: tuple[str, ...] = ()
    parallel: bool = False
    interrupted: bool = False

    def turns(self, template: ChatTemplate, conversation: Conversation) -> list[Turn] | None:
        """The trained turns, as `ChatTemplate.turn` would give them; None if the conversation does
        not fit.
        """
        end = conversation.trained[-1] + 1
        messages = conversation.messages[:end]
        if not self._may_fit(messages, conversation.trained):
            return None
        pairs = None if conversation.tools else _pairs(messages)
        if pairs is None and not self._fits_headers(messages):
            return None
        try:
            text = template.render(conversation, end, False, **self.switch)
        except RowError:
            return None  # turn by turn it is found out what is wrong
        if pairs is None:
            return self._cut_at_headers(text, messages, conversation.trained)
        turns = self._take_apart(text, pairs)
        if turns is None:
            return None
        first = end - 2 * len(pairs)  # message of the first pair
        return [turns[(t - first) // 2] for t in conversation.trained]

    def _may_fit(self, messages: list[ChatMessage], trained: list[int]) -> bool:
        if any(messages[t]["role"] != "assistant" for t in trained):
            return False
        return self.system or messages[0]["role"] != "system"

    def _take_apart(self, text: str, pairs: list[tuple[str, str]]) -> list[Turn] | None:
        """The turns of all pairs; None if the text is not made of the constant texts and the
        contents.
        """
        gap = self.gap
        close = self.between
        newest = len(pairs) - 1
        at = 0
        found: list[Turn] = []
        for i, (user, answer) in enumerate(pairs):
            if i == newest:
                gap = self.last_gap
                close = self.last_close
            if i == 0:
                at = max(text.find(form + gap) for form in _forms(user))
                if at < 0:
                    return None
            user_end = _after(text, at, user, gap)
            if user_end is None:
                return None
            begin = user_end + len(gap)
            end = _after(text, begin, answer, close)
            if end is None:
                return None
            prompt = text[:user_end] + self.served
            output = self.lead + text[begin:end] + self.close
            found.append(Turn(prompt, output, self.ends, self.note, self.switch))
            at = end + len(close)
        if at != len(text):
            return None
        return found

    def _fits_headers(self, messages: list[ChatMessage]) -> bool:
        """Whether a conversation may be cut at headers: each message follows one that a probe had
        before it, and no content is one that templates treat in special ways.
        """
        if not self.header:
            return False
        before = None
        for message in messages:
            if not self._may_follow(before, message) or _is_special(message):
                return False
            before = "call" if message.get("tool_calls") else message["role"]
        return True

    def _may_follow(self, before: str | None, message: ChatMessage) -> bool:
        """Whether a probe had such a message behind one of the role `before`."""
        role = message["role"]
        if before not in _BEFORE.get(role, ()):
            return False
        if before == "tool" and role == "user" and not self.interrupted:
            return False
        return self.parallel or len(message.get("tool_calls", ())) <= 1

    def _cut_at_headers(
        self, text: str, messages: list[ChatMessage], trained: list[int]
    ) -> list[Turn] | None:
        """The turns of a conversation with tool calls: each begins at a header and ends at a stop
        token.

        No content can spell either, for special tokens in contents are marked; if they are not, the
        count tells. Where prompts do not continue each other, only the newest turn has its lead in
        the rendering.
        """
        answers = [t for t, message in enumerate(messages) if message["role"] == "assistant"]
        headers = re.finditer(re.escape(self.header), text)
        begins = [header.end() for header in headers]
        if len(begins) != len(answers):
            return None
        limits = [*begins[1:], len(text)]
        found: list[Turn] = []
        for t, begin, limit in zip(answers, begins, limits, strict=True):
            output = self._output(text, begin, limit, messages[t])
            if output is None:
                return None
            if not self.joined and not text.startswith(self.lead, begin):
                output = self.lead + output
            if t in trained:
                found.append(Turn(text[:begin], output, True))
        return found

    def _output(self, text: str, begin: int, limit: int, message: ChatMessage) -> str | None:
        """What the message says in `text[begin:limit]`, up to and with the stop token; None if a
        part of it is not there.
        """
        ends: list[tuple[int, str]] = []
        for stop in self.stops:
            at = text.find(stop, begin, limit)
            if at >= 0:
                ends.append((at, stop))
        if not ends:
            return None
        end, stop = min(ends)
        output = text[begin:end]
        if message["content"] not in output:
            return None
        if lost_call(message, output) or has_new_escapes(output, message):
            return None
        return output + stop


def _pairs(messages: list[ChatMessage]) -> list[tuple[str, str]] | None:
    """The (user, answer) contents, if all is plain."""
    if messages[0]["role"] == "system":
        if messages[0].keys() != _PLAIN:
            return None
        messages = messages[1:]
    if not messages or len(messages) % 2 or not _is_plain(messages):
        return None
    contents = [message["content"] for message in messages]
    users = contents[::2]
    answers = contents[1::2]
    if any(_may_be_rewritten(answer, len(answers)) for answer in answers):
        return None
    return list(zip(users, answers, strict=True))


def _may_be_rewritten(content: str, answers: int) -> bool:
    """Whether a template may write the content of one of so many answers otherwise than it is."""
    if may_think(content) or not content.strip():
        return True
    # The newest answer may be trimmed otherwise than earlier ones.
    return answers > 1 and content != content.strip()


def _is_plain(messages: list[ChatMessage]) -> bool:
    """Whether users and answers take turns, and say nothing beside their contents."""
    for number, message in enumerate(messages):
        role = "assistant" if number % 2 else "user"
        if message["role"] != role or message.keys() != _PLAIN:
            return False
    return True


def _is_special(message: ChatMessage) -> bool:
    """Whether templates may treat the content of a message in special ways."""
    content = message["content"]
    if may_think(content) or not message.keys().isdisjoint(REASONING):
        return True
    if message["role"] != "assistant":
        return False
    if content != content.strip():
        return True
    return not content and not message.get("tool_calls")


def _forms(content: str) -> tuple[str, ...]:
    """A content as templates write it: as it is, or without the white space around it."""
    trimmed = content.strip()
    if trimmed == content:
        return (content,)
    return content, trimmed


def _after(text: str, at: int, content: str, then: str) -> int | None:
    """The end of `content` (in one of its forms) at `at` with `then` behind it; None if it is not
    there.
    """
    for form in _forms(content):
        end = at + len(form)
        if text.startswith(form, at) and text.startswith(then, end):
            return end
    return None
