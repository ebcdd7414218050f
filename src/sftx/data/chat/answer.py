"""One trained turn: the prompt that a server sends for it, and what the model must answer.

For turn t the prompt is `render(messages[:t], add_generation_prompt=True)` and the output is what
`render(messages[:t + 1])` adds to it, up to and including the stop token. Every output is checked:
it holds the content, the calls and the thought of its message, and no header of a turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TypedDict

from sftx.data.chat.calls import has_new_escapes, lost_call
from sftx.data.chat.conversation import REASONING, ChatMessage, Conversation, reasoning_of
from sftx.data.chat.renderer import MODEL, NEXT, THOUGHT, TOOL, common, common_length
from sftx.data.chat.thoughts import close_tag, open_tag, opening_of, thought_in
from sftx.data.chat.traits import Switch, Traits
from sftx.data.tokenizer import Tokenizer
from sftx.types import Function, RowError, ToolCall

CLOSED = "forced opening closed"
CHANGED = "text changed by the template"
_ASKS = ("user", "tool")  # roles that ask for an answer


@dataclass(slots=True)
class Turn:
    """One trained turn as text.

    `ends`: the output ends in the template's stop token; if not, EOS must follow it. `switch`:
    settings of the template that the server must send along with the messages.
    """

    prompt: str
    output: str
    ends: bool
    note: str = ""
    switch: Switch = field(default_factory=dict[str, bool])


class _Changes(TypedDict, total=False):
    """Other values for fields of a message."""

    content: str
    reasoning_content: str
    thinking: str
    reasoning: str
    tool_calls: list[ToolCall]


class Answer:
    """Turn `t` of a conversation, rendered with one of the template's own settings for thoughts.

    `full`: the text of the messages up to and with it. `thought`: what the turn thinks. `RowError`
    where no faithful rendering exists.
    """

    def __init__(self, traits: Traits, conversation: Conversation, t: int, switch: Switch) -> None:
        self._traits = traits
        self._tokenizer = traits.tokenizer
        self._name = traits.renderer.name
        self._conversation = conversation
        self._t = t
        self._switch = switch
        self._message = conversation.messages[t]
        self._content: str = self._message["content"]
        self._own_thought = thought_of(self._message, traits.thought_tag)
        self._thought = self._own_thought.strip()
        self.full = self._rendered(t + 1)

    def turn(self, close_opening: bool) -> Turn:
        """The turn. A thought that the prompt opens and the turn does not have is closed, or an
        error if not `close_opening`.
        """
        prompt = self.prompt()
        note = self._note(prompt, close_opening)
        output = self._continuation(prompt)
        self._check(output)
        content = self._content.strip()
        if not note and not self._thought and content not in output:
            note = CHANGED
        said = [content, self._thought]
        unwritten = self._traits.ending.unwritten
        for call in self._message.get("tool_calls", ()):
            said.append(call["function"]["name"])
            if unwritten:
                unwritten = self._traits.unwritten_after_call
        said = [text for text in said if text]
        return self._ended(prompt, output, note, said, unwritten)

    def turn_of_another(self) -> Turn:
        """A turn that no model is asked for: its prompt ends where the content begins."""
        probe = self._rendered_with({"content": MODEL})
        before, found, _ = probe.rpartition(MODEL)
        if not found or not self.full.startswith(before):
            raise self._unfaithful("")
        output = self.full[len(before) :]
        unwritten = self._traits.ending.unwritten
        return self._ended(before, output, "", [self._content], unwritten)

    def prompt(self) -> str:
        """What a server sends for the turn."""
        header = self._traits.header
        if self._t == 0:
            begin = self._behind_header(header)
            if begin is None:
                raise RowError(
                    "the conversation begins with an output, and the template writes no prompt "
                    "before it: put a prompt first, or data.train_on: last trains only the last "
                    "answer"
                )
            return self.full[:begin]
        prompt = self._rendered(self._t, generate=True)
        before = self._before["role"]
        asks = before in _ASKS or (before != "assistant" and not header)
        served_without_asking = not asks and prompt == self._rendered(self._t)
        if not prompt or served_without_asking:
            raise RowError(
                f"turn {self._t}: the {self._name} has no prompt for an answer that follows a "
                f"message of the role {before!r}: no server can ask for it; join the two messages, "
                "or set train: false on this one"
            )
        return prompt

    @property
    def _before(self) -> ChatMessage:
        """The message before the turn."""
        return self._conversation.messages[self._t - 1]

    def _rendered(self, end: int, generate: bool = False) -> str:
        render = self._traits.renderer.render
        return render(self._conversation, end, generate, **self._switch)

    def _rendered_with(self, changes: _Changes) -> str:
        """The text of the messages up to this one, with changes to it."""
        changed: ChatMessage = {**self._message, **changes}
        earlier = self._conversation.messages[: self._t]
        probe = self._conversation.with_messages([*earlier, changed])
        return self._traits.renderer.render(probe, self._t + 1, False, **self._switch)

    def _note(self, prompt: str, close_opening: bool) -> str:
        """What was done so that the turn could follow the prompt."""
        tag = open_tag(prompt)
        if tag and not self._thought:
            if close_opening:
                return CLOSED
            raise RowError(
                f"turn {self._t}: the prompt opens a thought ({tag!r}) that the turn does not "
                "have; data.forced_opening: close closes it"
            )
        if not self._switch:
            return ""
        kind = "thinking prompt" if self._thought else "no-thinking prompt"
        settings = ", ".join(f"{key}={value}" for key, value in self._switch.items())
        return f"{kind} ({settings})"

    def _continuation(self, prompt: str) -> str:
        """What must follow `prompt` so that the turn has been said."""
        if self.full.startswith(prompt):
            rest = self.full[len(prompt) :]
            if self._t and self._before["role"] == "tool":
                return rest.removeprefix(self._traits.header)
            return rest
        opening, tag = opening_of(prompt)
        base = prompt.removesuffix(opening)
        if self.full.startswith(base):
            begin = len(base)
        elif self._continues_without_header(base):
            begin = len(base) - len(self._traits.header)
        else:
            begin = self._begin_after_rewriting(base)
        rest = self.full[begin:]
        if not tag:
            return rest
        return self._behind_opening(opening, tag, rest, prompt)

    def _behind_opening(self, opening: str, tag: str, rest: str, prompt: str) -> str:
        """The answer `rest`, which does not know that the prompt ends in `opening`, as it must go
        on behind that.
        """
        shared = common_length(opening, rest)
        tail = rest
        if shared >= len(tag):
            tail = rest[shared:]
        closing = close_tag(tag)
        is_said = bool(self._thought) and self._thought in tail
        is_closed = tail.lstrip().startswith(closing)
        if closing in opening:  # the prompt holds an empty thought
            if is_said:
                raise self._unfaithful(prompt)
            if not is_closed:
                return tail
            return tail.lstrip().removeprefix(closing)
        if is_said and closing in tail:
            return tail
        if self._thought:
            return self._thought_before(tail, opening, tag, is_closed)
        if is_closed:
            return tail
        return self._traits.closed_at_once(opening, tag) + tail

    def _thought_before(self, tail: str, opening: str, tag: str, is_closed: bool) -> str:
        """The thought of the turn, closed, before the `tail` of the answer, which lacks it."""
        written = reasoning_of(self._message).strip("\n")
        if written:
            closing = "" if is_closed else self._traits.closing(tag)
            return written + closing + tail
        # The thought stands in the content.
        closing = close_tag(tag)
        inside, _, after = self._content.partition(closing)
        thought = inside.lstrip().removeprefix(opening).removeprefix(tag)
        if not tail[:1].isspace():
            gap = after.removesuffix(after.lstrip())
            tail = gap + tail
        return thought + closing + tail

    def _continues_without_header(self, base: str) -> bool:
        """Whether the text goes on where the prompt has a header, as some templates do behind a
        tool result.
        """
        header = self._traits.header
        first = self._tokenizer.splitting.search(header)
        if first is None or not base.endswith(header):
            return False
        begin = len(base) - len(header)
        if not self.full.startswith(base[:begin]):
            return False
        between = self.full[begin : self._begin_of_payload()]
        return first.group() not in between

    def _begin_after_rewriting(self, base: str) -> int:
        """Where the turn begins if the template writes earlier turns otherwise once it is there:
        behind the last header before what it says. `RowError` if the message before stands between
        them.
        """
        last = last_added(self._tokenizer, base)
        header = self._traits.header
        if last is not None:
            header = base[last.start() :]
        begin = self._behind_header(header)
        if begin is None:
            raise self._unfaithful(base)
        if self._before["content"]:
            messages = list(self._conversation.messages)
            messages[self._t - 1] = {**self._before, "content": NEXT}
            probe = self._conversation.with_messages(messages)
            other = Answer(self._traits, probe, self._t, self._switch)
            at = other._behind_header(header)
            if at is None or NEXT in other.full[at:]:
                raise self._unfaithful(base)
        return begin

    def _behind_header(self, header: str) -> int | None:
        """The end of the last `header` before what the turn says; None if there is none."""
        payload = self._begin_of_payload()
        at = self.full.rfind(header, 0, payload)
        if at < 0 or not header.strip():
            return None
        return at + len(header)

    def _begin_of_payload(self) -> int:
        """Where the first thing that the turn says begins: before it, another turn would read the
        same.
        """
        message = self._message
        changes: _Changes = {}
        for name in REASONING:
            if message.get(name):
                changes[name] = THOUGHT
        if message["content"]:
            changes["content"] = MODEL
        if calls := message.get("tool_calls"):
            changes["tool_calls"] = [_to_the_probe(call) for call in calls]
        if {**message, **changes} == message:
            changes = {"content": MODEL}
        probe = self._rendered_with(changes)
        return len(common(self.full, probe))

    def _check(self, output: str) -> None:
        """`RowError` if a part of what the turn says is not in its output."""
        content = self._content.strip()
        if lost := lost_call(self._message, output):
            raise RowError(
                f"turn {self._t}: the {self._name} does not render tool calls as they are: {lost}"
            )
        if has_new_escapes(output, self._message):
            raise RowError(
                f"turn {self._t}: the {self._name} writes HTML escapes that the row does not have: "
                f"{output!r:.200}"
            )
        thought_inside = bool(self._own_thought) and self._own_thought in content
        if content in output or thought_inside:
            return
        # Does the template write a content at this turn at all?
        probe = self._rendered_with({"content": MODEL})
        if MODEL not in probe.lower():
            raise RowError(
                f"turn {self._t}: the {self._name} leaves out the content of the answer "
                f"({content[:80]!r})"
            )

    def _ended(self, prompt: str, output: str, note: str, said: list[str], unwritten: str) -> Turn:
        """The turn with its output cut after the first stop token that follows all that was `said`,
        or with the `unwritten` one added.
        """
        ending = self._traits.ending
        stop = ending.stop
        ends = True
        if stop is not None and stop in output and not unwritten:
            spoken = 0
            for text in said:
                if text in output:
                    spoken = max(spoken, output.rfind(text) + len(text))
            at = output.find(stop, spoken)
            if at < 0:
                at = output.rfind(stop)
            output = output[: at + len(stop)]
        elif (end := self._end_of_special(output)) is not None:
            output = output[:end]
        else:
            output = output.removesuffix(ending.written) + unwritten
            ends = bool(unwritten)
        return Turn(prompt, output, ends, note, self._switch)

    def _end_of_special(self, output: str) -> int | None:
        """Where the special token ends that an output ends in; None if it ends in none."""
        last = last_added(self._tokenizer, output)
        if last is None or not self._tokenizer.is_special(last.group()):
            return None
        if output[last.end() :].strip():
            return None
        return last.end()

    def _unfaithful(self, prompt: str) -> RowError:
        shared = common_length(prompt, self.full)
        at = max(shared - 40, 0)
        return RowError(
            f"turn {self._t}: the chat template does not continue the prompt that a server would "
            f"send.\n  prompt:       ...{prompt[at:][:200]!r}\n"
            f"  conversation: ...{self.full[at:][:200]!r}"
        )


def _to_the_probe(call: ToolCall) -> ToolCall:
    """A call with the tool of the probes in place of its own."""
    function: Function = {**call["function"], "name": TOOL}
    return {**call, "function": function}


def thought_of(message: ChatMessage, tag: str) -> str:
    """The thought of a message, from its own field or from its content; "" if it has none."""
    return reasoning_of(message) or thought_in(message["content"], tag)


def last_added(tokenizer: Tokenizer, text: str) -> re.Match[str] | None:
    """The last added token in a text; None if it has none."""
    last = None
    for match in tokenizer.splitting.finditer(text):
        last = match
    return last
