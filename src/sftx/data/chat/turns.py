"""The two texts that define a trained turn: what a server sends, and what the model must answer.

For turn t the prompt is `render(messages[:t], add_generation_prompt=True)` and the output is what
`render(messages[:t + 1])` adds to it, up to and including the stop token. Every output is checked:
it holds the content, the calls and the thought of its message, and no header of a turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from sftx.data.chat.calls import has_new_escapes, lost_call
from sftx.data.chat.conversation import REASONING, Conversation
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
    says,
)
from sftx.data.chat.thoughts import close_tag, open_tag, opening_of, thought_in
from sftx.data.chat.traits import Traits
from sftx.data.tokenizer import Tokenizer
from sftx.types import RowError

CLOSED = "forced opening closed"
LOST_REASONING = "reasoning left out by the template"
CHANGED = "text changed by the template"
_ASKS = ("user", "tool")  # roles that ask for an answer


@dataclass(slots=True)
class Turn:
    """One trained turn as text. `ends`: the output ends in the template's stop token; if not, EOS
    must follow it. `switch`: settings of the template that the server must send along with the
    messages.
    """

    prompt: str
    output: str
    ends: bool
    note: str = ""
    switch: dict[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """A chat template, and the turns of conversations rendered with it. `UserError` if it does not
    compile.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        forced_opening: Literal["close", "error"] = "close",
        name: str = "chat template",
        lost_reasoning: Literal["note", "error"] = "note",
    ):
        self.source = source
        self.name = name
        self._tokenizer = tokenizer
        self._forced_opening = forced_opening
        self._lost_reasoning = lost_reasoning
        self._renderer = Renderer(source, tokenizer.special, name)
        self.render = self._renderer.render
        self.traits = Traits(self._renderer, tokenizer)

    @property
    def stop_id(self) -> int | None:
        """The token that ends an output with this template: its stop token, else EOS."""
        stop = self.traits.ending.stop
        return self._tokenizer.eos_id if stop is None else self._tokenizer.backend.token_to_id(stop)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end outputs: `stop_id`, and the one after a tool call where that is
        another.
        """
        try:
            turn = self.turn(Conversation([says("user", USER), calls({})], [0.0, 1.0], TOOLS), 1)
        except RowError:
            turn = Turn("", "", False)
        last = last_added(self._tokenizer, turn.output) if turn.ends else None
        after_call = self._tokenizer.backend.token_to_id(last.group()) if last else None
        return frozenset(token for token in (self.stop_id, after_call) if token is not None)

    def turn(self, conversation: Conversation, t: int) -> Turn:
        """Prompt and output of turn `t`. `RowError` if no faithful rendering exists."""
        message = conversation.messages[t]
        if message["role"] != "assistant":
            return self._other_turn(conversation, t)
        thought = self._thought(message).strip()
        refusal: RowError | None = None
        without_thought: Turn | None = None
        for switch in self._switches(conversation, t, thought):
            try:
                turn = self._answer(conversation, t, thought, switch)
            except RowError as error:
                refusal = refusal or error
                continue
            if not thought or thought in turn.output:
                return turn
            without_thought = without_thought or turn
        if without_thought is None:
            assert refusal is not None
            raise refusal
        if self._lost_reasoning == "error":
            raise RowError(
                f"turn {t}: the {self.name} leaves out the reasoning; {self.how_to_keep_thoughts()}"
            )
        without_thought.note = "; ".join(filter(None, [LOST_REASONING, without_thought.note]))
        return without_thought

    def how_to_keep_thoughts(self) -> str:
        """What a user can do against lost reasoning."""
        setting = self.traits.keeps_thoughts
        if setting:
            return f"chat_template_kwargs {setting} in a row keeps it"
        return "set data.template to a template that writes reasoning_content"

    def _switches(self, conversation: Conversation, t: int, thought: str) -> list[dict[str, Any]]:
        """The settings of the template to try, best first; those that a row sets itself stay as
        they are.
        """
        own = self.traits.switches[bool(thought)]
        if not own or own.keys() & conversation.kwargs.keys():
            return [{}]
        if thought:
            return [{}, own]
        prompt, _ = self._prompt(conversation, t, {})
        if not open_tag(prompt) or self.render(conversation, t + 1, False).startswith(prompt):
            return [{}]
        return [own, {}]

    def _answer(
        self, conversation: Conversation, t: int, thought: str, switch: dict[str, Any]
    ) -> Turn:
        """Turn `t` with these settings of the template."""
        message = conversation.messages[t]
        prompt, full = self._prompt(conversation, t, switch)
        tag = open_tag(prompt)
        note = ""
        if tag and not thought:
            note = CLOSED
            if self._forced_opening == "error":
                raise RowError(
                    f"turn {t}: the prompt opens a thought ({tag!r}) that the turn does not have; "
                    "data.forced_opening: close closes it"
                )
        elif switch:
            kind = "thinking prompt" if thought else "no-thinking prompt"
            note = f"{kind} ({', '.join(f'{key}={value}' for key, value in switch.items())})"
        output = self._continuation(conversation, t, prompt, full, thought, switch)
        said = self._check(conversation, t, output, thought, switch)
        if not note and not thought and message["content"].strip() not in output:
            note = CHANGED
        unwritten = self.traits.ending.unwritten
        if unwritten and message.get("tool_calls"):
            unwritten = self.traits.unwritten_after_call
        return self._ended(prompt, output, note, said, unwritten, switch)

    def _prompt(
        self, conversation: Conversation, t: int, switch: dict[str, Any]
    ) -> tuple[str, str]:
        """What a server sends for turn `t`, and the text of the messages up to and with it."""
        full = self.render(conversation, t + 1, False, **switch)
        header = self.traits.header
        if t == 0:
            begin = self._behind_header(conversation, t, header, full, switch)
            if begin is None:
                raise RowError(
                    "the conversation begins with an output, and the template writes no prompt "
                    "before it: "
                    "put a prompt first, or data.train_on: last trains only the last answer"
                )
            return full[:begin], full
        prompt = self.render(conversation, t, True, **switch)
        before = conversation.messages[t - 1]["role"]
        asks = before in _ASKS or (before != "assistant" and not header)
        if not prompt or (not asks and prompt == self.render(conversation, t, False, **switch)):
            raise RowError(
                f"turn {t}: the {self.name} has no prompt for an answer that follows a message of "
                f"the role {before!r}: "
                "no server can ask for it; join the two messages, or set train: false on this one"
            )
        return prompt, full

    def _continuation(
        self,
        conversation: Conversation,
        t: int,
        prompt: str,
        full: str,
        thought: str,
        switch: dict[str, Any],
    ) -> str:
        """What must follow `prompt` so that turn `t` has been said."""
        if full.startswith(prompt):
            rest = full[len(prompt) :]
            after_tool = t > 0 and conversation.messages[t - 1]["role"] == "tool"
            return rest.removeprefix(self.traits.header) if after_tool else rest
        opening, tag = opening_of(prompt)
        base = prompt.removesuffix(opening)
        if full.startswith(base):
            begin = len(base)
        elif self._continues_without_header(conversation, t, base, full, switch):
            begin = len(base) - len(self.traits.header)
        else:
            begin = self._begin_after_rewriting(conversation, t, base, full, switch)
        rest = full[begin:]
        if not tag:
            return rest
        return self._after_opening(
            opening, tag, rest, thought, conversation.messages[t], _unfaithful(prompt, full, t)
        )

    def _after_opening(
        self,
        opening: str,
        tag: str,
        rest: str,
        thought: str,
        message: dict[str, Any],
        unfaithful: RowError,
    ) -> str:
        """The answer `rest`, which does not know that the prompt ends in `opening`, as it must go
        on behind that.
        """
        shared = common_length(opening, rest)
        tail = rest[shared:] if shared >= len(tag) else rest
        closing = close_tag(tag)
        if closing in opening:  # the prompt holds an empty thought
            if thought and thought in tail:
                raise unfaithful
            begun = tail.lstrip()
            return begun.removeprefix(closing) if begun.startswith(closing) else tail
        if thought and thought in tail and closing in tail:
            return tail
        begun = tail.lstrip().startswith(closing)
        if thought:
            written = next((message[key] for key in REASONING if message.get(key)), "").strip("\n")
            if written:
                return written + ("" if begun else self.traits.closing(tag)) + tail
            inside, _, after = message["content"].partition(
                closing
            )  # the thought stands in the content
            gap = "" if tail[:1].isspace() else after.removesuffix(after.lstrip())
            return inside.lstrip().removeprefix(opening).removeprefix(tag) + closing + gap + tail
        return tail if begun else self.traits.closed_at_once(opening, tag) + tail

    def _continues_without_header(
        self, conversation: Conversation, t: int, base: str, full: str, switch: dict[str, Any]
    ) -> bool:
        """Whether the text goes on where the prompt has a header, as some templates do behind a
        tool result.
        """
        header = self.traits.header
        first = self._tokenizer.splitting.search(header)
        if (
            first is None
            or not base.endswith(header)
            or not full.startswith(base.removesuffix(header))
        ):
            return False
        payload = self._begin_of_payload(conversation, t, full, switch)
        return first.group() not in full[len(base) - len(header) : payload]

    def _begin_after_rewriting(
        self, conversation: Conversation, t: int, base: str, full: str, switch: dict[str, Any]
    ) -> int:
        """Where turn `t` begins in `full` if the template writes earlier turns otherwise once this
        turn is there: behind the last header before what it says. `RowError` if the message before
        stands between them.
        """
        last = last_added(self._tokenizer, base)
        header = base[last.start() :] if last else self.traits.header
        begin = self._behind_header(conversation, t, header, full, switch)
        before = conversation.messages[t - 1]
        if begin is not None and before["content"]:
            messages = [
                *conversation.messages[: t - 1],
                {**before, "content": NEXT},
                conversation.messages[t],
            ]
            probe = Conversation(messages, [], conversation.tools, conversation.kwargs)
            text = self.render(probe, t + 1, False, **switch)
            at = self._behind_header(probe, t, header, text, switch)
            if at is None or NEXT in text[at:]:
                begin = None
        if begin is None:
            raise _unfaithful(base, full, t)
        return begin

    def _behind_header(
        self, conversation: Conversation, t: int, header: str, full: str, switch: dict[str, Any]
    ) -> int | None:
        """The end of the last `header` before what turn `t` says; None if there is none."""
        payload = self._begin_of_payload(conversation, t, full, switch)
        at = full[:payload].rfind(header) if header.strip() else -1
        return None if at < 0 else at + len(header)

    def _begin_of_payload(
        self, conversation: Conversation, t: int, full: str, switch: dict[str, Any]
    ) -> int:
        """Where the first thing that turn `t` says begins in `full`: before it, another turn would
        read the same.
        """
        message = conversation.messages[t]
        other = {**message, **{key: THOUGHT for key in REASONING if message.get(key)}}
        if message["content"]:
            other["content"] = MODEL
        if message.get("tool_calls"):
            other["tool_calls"] = [
                {**call, "function": {**call["function"], "name": "qztool"}}
                for call in message["tool_calls"]
            ]
        if other == message:
            other = {**message, "content": MODEL}
        messages = [*conversation.messages[:t], other]
        probe = self.render(
            Conversation(messages, [], conversation.tools, conversation.kwargs),
            t + 1,
            False,
            **switch,
        )
        return len(common(full, probe))

    def _check(
        self, conversation: Conversation, t: int, output: str, thought: str, switch: dict[str, Any]
    ) -> list[str]:
        """What turn `t` says; `RowError` if a part of it is not in its output."""
        message = conversation.messages[t]
        content = message["content"].strip()
        if lost := lost_call(message, output):
            raise RowError(
                f"turn {t}: the {self.name} does not render tool calls as they are: {lost}"
            )
        if has_new_escapes(output, message):
            raise RowError(
                f"turn {t}: the {self.name} writes HTML escapes that the row does not have: "
                f"{output!r:.200}"
            )
        own_thought = self._thought(message)
        thought_inside = bool(own_thought) and own_thought in content
        if (
            content not in output
            and not thought_inside
            and not self._shows_content(conversation, t, switch)
        ):
            raise RowError(
                f"turn {t}: the {self.name} leaves out the content of the answer ({content[:80]!r})"
            )
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        return [text for text in (content, thought, *names) if text]

    def _shows_content(self, conversation: Conversation, t: int, switch: dict[str, Any]) -> bool:
        """Whether the template writes a content at this turn at all."""
        messages = [*conversation.messages[:t], {**conversation.messages[t], "content": MODEL}]
        probe = Conversation(messages, [], conversation.tools, conversation.kwargs)
        return MODEL in self.render(probe, t + 1, False, **switch).lower()

    def _other_turn(self, conversation: Conversation, t: int) -> Turn:
        """A turn that no model is asked for: its prompt ends where the content begins."""
        full = self.render(conversation, t + 1, False)
        content = conversation.messages[t]["content"]
        messages = [*conversation.messages[:t], {**conversation.messages[t], "content": MODEL}]
        probe = self.render(
            Conversation(messages, [], conversation.tools, conversation.kwargs), t + 1, False
        )
        at = probe.rfind(MODEL)
        if at < 0 or not full.startswith(probe[:at]):
            raise _unfaithful("", full, t)
        return self._ended(full[:at], full[at:], "", [content], self.traits.ending.unwritten, {})

    def _ended(
        self,
        prompt: str,
        output: str,
        note: str,
        said: list[str],
        unwritten: str,
        switch: dict[str, Any],
    ) -> Turn:
        """The turn with its output cut after the first stop token that follows all that was `said`,
        or with the `unwritten` one added.
        """
        ending = self.traits.ending
        if ending.stop is not None and ending.stop in output and not unwritten:
            spoken = max(
                (output.rfind(text) + len(text) for text in said if text in output), default=0
            )
            at = output.find(ending.stop, spoken)
            at = output.rfind(ending.stop) if at < 0 else at
            return Turn(prompt, output[: at + len(ending.stop)], True, note, switch)
        last = last_added(self._tokenizer, output)
        if last and self._tokenizer.is_special(last.group()) and not output[last.end() :].strip():
            return Turn(prompt, output[: last.end()], True, note, switch)
        return Turn(
            prompt, output.removesuffix(ending.written) + unwritten, bool(unwritten), note, switch
        )

    def _thought(self, message: dict[str, Any]) -> str:
        """The thought of a turn, from its own field or from its content; "" if it has none."""
        own = next((message[key] for key in REASONING if message.get(key)), "")
        return own or thought_in(message["content"], self.traits.thought_tag)


def last_added(tokenizer: Tokenizer, text: str) -> re.Match[str] | None:
    """The last added token in a text; None if it has none."""
    return next(reversed(list(tokenizer.splitting.finditer(text))), None)


def _unfaithful(prompt: str, full: str, t: int) -> RowError:
    at = max(common_length(prompt, full) - 40, 0)
    return RowError(
        f"turn {t}: the chat template does not continue the prompt that a server would send.\n"
        f"  prompt:       ...{prompt[at:][:200]!r}\n  conversation: ...{full[at:][:200]!r}"
    )
