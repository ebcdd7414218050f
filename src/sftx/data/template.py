"""A chat template, and the two texts that define a trained turn: what a server sends, and what the model must answer.

For turn t the prompt is `render(messages[:t], add_generation_prompt=True)` and the output is what
`render(messages[:t + 1])` adds to it, up to and including the stop token. `ChatTemplate` learns the habits of its
template from a few probes: its stop token, whether its prompt opens a thought, and how to close that again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sftx.data.conversation import REASONING, Conversation
from sftx.data.habits import MODEL, TOOLS, USER, Habits, calls, close_tag, common, last_tag, open_tag, says
from sftx.data.sandbox import TEMPLATE_ERRORS, LimitError, compile_template, run_template
from sftx.data.tokenizer import Tokenizer
from sftx.types import RowError, UserError

CLOSED = "forced opening closed"
LOST_REASONING = "reasoning left out by the template"
CHANGED = "text changed by the template"


@dataclass(slots=True)
class Turn:
    """One trained turn as text. `ends`: the output ends in the template's stop token; if not, EOS must follow it.
    `switch`: settings of the template that the server must send along with the messages."""

    prompt: str
    output: str
    ends: bool
    note: str = ""
    switch: dict[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """A chat template and what was learned about it. `UserError` if it does not compile."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        forced_opening: Literal["close", "error"] = "close",
        name: str = "chat template",
    ):
        self.source = source
        self.name = name
        self._tokenizer = tokenizer
        self._forced_opening = forced_opening
        try:
            self._template = compile_template(source)
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{name}: the template does not compile: {error}") from error
        self._over = 0  # renderings that went over the limits of the sandbox
        self.habits = Habits(source, tokenizer, self._render, name)

    @property
    def stop_id(self) -> int | None:
        """The token that ends an output with this template: its stop token, else EOS."""
        stop = self.habits.ending.stop
        return self._tokenizer.eos_id if stop is None else self._tokenizer.backend.token_to_id(stop)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end outputs: `stop_id`, and the one after a tool call where that is another."""
        try:
            turn = self.turn(Conversation([says("user", USER), calls({})], [0.0, 1.0], TOOLS), 1)
        except RowError:
            turn = Turn("", "", False)
        at = self.last_added(turn.output) if turn.ends else None
        after_call = self._tokenizer.backend.token_to_id(turn.output[slice(*at)]) if at else None
        return frozenset(token for token in (self.stop_id, after_call) if token is not None)

    def render(self, conversation: Conversation, end: int, generate: bool, **kwargs: Any) -> str:
        """The text of the first `end` messages, as transformers renders them. `RowError` if the template refuses."""
        if end == 0:
            raise RowError("the conversation begins with an output that no server can be asked for: put a prompt first")
        key, known = (self, end, generate, *kwargs.items()), conversation.renderings
        if key not in known:
            messages = [self.habits.shaped(message) for message in conversation.messages[:end]]
            try:
                known[key] = self._render(messages, conversation.tools, generate, {**conversation.kwargs, **kwargs})
            except TEMPLATE_ERRORS as error:
                self._over += isinstance(error, LimitError)
                if self._over > 5:  # each took seconds
                    raise UserError(f"the {self.name} goes over its limits in {self._over} rows: {error}") from error
                raise RowError(f"the {self.name} refuses the messages up to turn {end}: {error}") from error
        return known[key]

    def _render(self, messages: Sequence[Any], tools: Any, generate: bool, kwargs: dict[str, Any]) -> str:
        variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generate}
        return run_template(self._template, {**self._tokenizer.special, **variables, **kwargs})

    def turn(self, conversation: Conversation, t: int) -> Turn:
        """Prompt and output of turn `t`. `RowError` if no faithful rendering exists."""
        message = conversation.messages[t]
        if message["role"] != "assistant":
            return self._other_turn(conversation, t)
        reasoning = _reasoning(message, self.habits.thought)
        prompt, output, note, switch = (self._with_thought if reasoning else self._without_thought)(conversation, t)
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in output:
                raise RowError(f"turn {t}: the {self.name} does not render tool calls: nothing of {call!r} is left")
        if not note and message["content"].strip() not in output and not reasoning:
            note = CHANGED
        said = [message["content"].strip(), reasoning, *(c["function"]["name"] for c in message.get("tool_calls", ()))]
        unwritten = self.habits.ending.unwritten
        if unwritten and message.get("tool_calls"):
            unwritten = self.habits.unwritten_after_call
        return replace(self._ended(prompt, output, note, [text for text in said if text], unwritten), switch=switch)

    def _without_thought(self, conversation: Conversation, t: int) -> tuple[str, str, str, dict[str, Any]]:
        prompt = self.render(conversation, t, True)
        tag = open_tag(prompt)
        if not tag:
            return prompt, self._output(conversation, t, prompt, {}), "", {}
        if self._forced_opening == "error":
            raise RowError(
                f"turn {t}: the prompt opens a thought ({tag!r}) that the turn does not have; "
                "data.forced_opening: close closes it"
            )
        switch = self._switch(conversation, False)
        if not switch or self.render(conversation, t + 1, False).startswith(prompt):
            return prompt, self._output(conversation, t, prompt, {}), CLOSED, {}
        prompt = self.render(conversation, t, True, **switch)
        return prompt, self._output(conversation, t, prompt, switch), _named("no-thinking prompt", switch), switch

    def _with_thought(self, conversation: Conversation, t: int) -> tuple[str, str, str, dict[str, Any]]:
        reasoning = _reasoning(conversation.messages[t], self.habits.thought).strip()
        refusal = None
        plain: tuple[str, str] | None = None
        thinking = self._switch(conversation, True)
        for switch in [{}, thinking] if thinking else [{}]:
            prompt = self.render(conversation, t, True, **switch)
            try:
                output = self._output(conversation, t, prompt, switch)
            except RowError as error:
                refusal = refusal or error
                continue
            if reasoning in output:
                return prompt, output, _named("thinking prompt", switch), switch
            plain = plain or (prompt, output)
        if plain is None:
            assert refusal is not None
            raise refusal
        return *plain, LOST_REASONING, {}

    def last_added(self, text: str) -> tuple[int, int] | None:
        """Where the last added token of a text stands; None if it has none."""
        last = next(reversed(list(self._tokenizer.splitting.finditer(text))), None)
        return last.span() if last else None

    def first_added(self, text: str) -> tuple[int, int] | None:
        """Where the first added token of a text stands; None if it has none."""
        first = self._tokenizer.splitting.search(text)
        return first.span() if first else None

    def _switch(self, conversation: Conversation, thinking: bool) -> dict[str, Any]:
        """The template's switch, unless the row sets it itself."""
        switch = self.habits.switches[thinking]
        return {} if switch.keys() & conversation.kwargs.keys() else switch

    def _output(self, conversation: Conversation, t: int, prompt: str, switch: dict[str, Any]) -> str:
        """What must follow `prompt` so that turn `t` has been said."""
        message = conversation.messages[t]
        full = self.render(conversation, t + 1, False, **switch)
        if full.startswith(prompt):
            return full[len(prompt) :]
        shared = prompt.removesuffix(self.habits.opening)
        if not full.startswith(shared):
            shared = common(prompt, full)
            if len(shared) < len(common(prompt, self.render(conversation, t, False, **switch))):
                return self._after_rewriting(conversation, t, prompt, full, switch)
        opening, tail = prompt[len(shared) :], full[len(shared) :]
        tag, closed = last_tag(shared[-40:] + opening)
        closing = close_tag(tag)
        reasoning = next((message[key] for key in REASONING if message.get(key)), "").strip("\n")
        if not tag:
            return tail  # the prompt only completes its own header
        if closed:
            if reasoning and reasoning in tail:
                raise _unfaithful(prompt, full, t)
            return tail.lstrip().removeprefix(closing) if tail.lstrip().startswith(closing) else tail
        if reasoning in tail and closing in tail:  # the full text closes the thought itself
            return tail
        if reasoning:
            return reasoning + ("" if tail.lstrip().startswith(closing) else self.habits.closing(tag)) + tail
        if closing in message["content"]:  # the thought stands in the content, and the template left it out
            body = message["content"].lstrip().removeprefix(opening).removeprefix(tag)
            stop = self.habits.ending.stop
            return body + (tail[tail.rfind(stop) :] if stop and stop in tail else "")
        return self.habits.closed_at_once(opening, tag) + tail

    def _after_rewriting(
        self, conversation: Conversation, t: int, prompt: str, full: str, switch: dict[str, Any]
    ) -> str:
        """The output where the template writes earlier turns otherwise once this one is there: the turn by itself."""
        message, lead = conversation.messages[t], self.habits.lead
        content = message["content"].strip()
        at = self._content_begins(conversation, t, switch) if content and "tool_calls" not in message else None
        if lead is None and (header := self.last_added(prompt)) and full[:at].endswith(prompt[header[0] :]):
            lead = ""  # the content stands right behind the header in which the prompt ends
        if at is None or lead is None or content not in full[at:]:
            raise _unfaithful(prompt, full, t)
        return lead + full[at:]

    def _content_begins(self, conversation: Conversation, t: int, switch: dict[str, Any]) -> int | None:
        """Where the content of turn `t` begins in the text of the messages up to it."""
        messages = [*conversation.messages[:t], {**conversation.messages[t], "content": MODEL}]
        probe = self.render(Conversation(messages, [], conversation.tools, conversation.kwargs), t + 1, False, **switch)
        at = probe.rfind(MODEL)
        full = self.render(conversation, t + 1, False, **switch)
        return at if at >= 0 and full.startswith(probe[:at]) else None

    def _other_turn(self, conversation: Conversation, t: int) -> Turn:
        """A turn that no model is asked for: its prompt ends where the content begins."""
        full = self.render(conversation, t + 1, False)
        at = self._content_begins(conversation, t, {})
        if at is None:
            raise _unfaithful(full[:0], full, t)
        said = [conversation.messages[t]["content"]]
        return self._ended(full[:at], full[at:], "", said, self.habits.ending.unwritten)

    def _ended(self, prompt: str, output: str, note: str, said: list[str], unwritten: str = "") -> Turn:
        """The turn with its output cut after the first stop token that follows all that was `said`, or with the
        `unwritten` one added."""
        ending = self.habits.ending
        if ending.stop is not None and ending.stop in output and not unwritten:
            spoken = max((output.rfind(text) + len(text) for text in said if text in output), default=0)
            at = output.find(ending.stop, spoken)
            at = output.rfind(ending.stop) if at < 0 else at
            return Turn(prompt, output[: at + len(ending.stop)], True, note)
        last = self.last_added(output)
        if last and self._tokenizer.is_special(output[slice(*last)]) and not output[last[1] :].strip():
            return Turn(prompt, output[: last[1]], True, note)
        return Turn(prompt, output.removesuffix(ending.written) + unwritten, bool(unwritten), note)


def _reasoning(message: dict[str, Any], tag: str) -> str:
    """The thought of a turn, from its own field or from its content; "" if it has none."""
    field = next((message[key] for key in REASONING if message.get(key)), "")
    if field or not tag or close_tag(tag) not in message["content"]:
        return field
    return message["content"].partition(close_tag(tag))[0].rpartition(tag)[2]


def _named(what: str, switch: dict[str, Any]) -> str:
    return f"{what} ({', '.join(f'{key}={value}' for key, value in switch.items())})" if switch else ""


def _unfaithful(prompt: str, full: str, t: int) -> RowError:
    at = max(len(common(prompt, full)) - 40, 0)
    return RowError(
        f"turn {t}: the chat template does not continue the prompt that a server would send.\n"
        f"  prompt:       ...{prompt[at:][:200]!r}\n  conversation: ...{full[at:][:200]!r}"
    )
