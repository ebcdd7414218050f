"""A chat template, and the two texts that define a trained turn: what a server sends, and what the model must answer.

For turn t the prompt is `render(messages[:t], add_generation_prompt=True)` and the output is what
`render(messages[:t + 1])` adds to it, up to and including the stop token. `ChatTemplate` learns the habits of its
template from a few probes: its stop token, whether its prompt opens a thought, and how to close that again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sftx.data.habits import MODEL, REASONING, Habits, close_tag, common, open_tag

from sftx.data.sandbox import TEMPLATE_ERRORS, compile_template, run_template
from sftx.data.tokenizer import Tokenizer
from sftx.types import RowError, UserError

CLOSED = "forced opening closed"
LOST_REASONING = "reasoning left out by the template"
CHANGED = "text changed by the template"


@dataclass(slots=True)
class Conversation:
    """What one row asks a template to render: messages as a template reads them, and the weight of each as a target."""

    messages: list[dict[str, Any]]
    weights: list[float]
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> list[int]:
        """The turns that carry weight."""
        return [t for t, weight in enumerate(self.weights) if weight]


@dataclass(slots=True)
class Turn:
    """One trained turn as text. `ends`: the output ends in the template's stop token; if not, EOS must follow it."""

    prompt: str
    output: str
    ends: bool
    note: str = ""


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
        self.habits = Habits(source, tokenizer, self._render)

    @property
    def stop_id(self) -> int | None:
        """The token that ends an output with this template: its stop token, else EOS."""
        stop = self.habits.ending.stop
        return self._tokenizer.eos_id if stop is None else self._tokenizer.backend.token_to_id(stop)

    def render(self, conversation: Conversation, end: int, generate: bool, **kwargs: Any) -> str:
        """The text of the first `end` messages, as transformers renders them. `RowError` if the template refuses."""
        if end == 0:
            raise RowError("the conversation begins with an output that no server can be asked for: put a prompt first")
        messages = [self.habits.shaped(message) for message in conversation.messages[:end]]
        try:
            return self._render(messages, conversation.tools, generate, {**conversation.kwargs, **kwargs})
        except TEMPLATE_ERRORS as error:
            raise RowError(f"the {self.name} refuses the messages up to turn {end}: {error}") from error

    def _render(self, messages: Sequence[Any], tools: Any, generate: bool, kwargs: dict[str, Any]) -> str:
        variables = {
            **self._tokenizer.special,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generate,
            **kwargs,
        }
        return run_template(self._template, variables)

    def turn(self, conversation: Conversation, t: int) -> Turn:
        """Prompt and output of turn `t`. `RowError` if no faithful rendering exists."""
        message = conversation.messages[t]
        if message["role"] != "assistant":
            return self._other_turn(conversation, t)
        prompt = self.render(conversation, t, True)
        reasoning = _reasoning(message, self.habits.thought)
        note = ""
        if not reasoning and open_tag(prompt[-200:].rpartition(conversation.messages[t - 1]["content"][-50:])[2]):
            if self._forced_opening == "error":
                raise RowError(
                    f"turn {t}: the prompt opens a thought ({prompt[-20:]!r}) that the turn does not have; "
                    "data.forced_opening: close closes it"
                )
            note = CLOSED
        output, switch = self._output(conversation, t, prompt, {}), {}
        if note and self._lacks_opening(conversation, t, prompt) and (switch := self.habits.switch(False)):
            prompt = self.render(conversation, t, True, **switch)
            output = self._output(conversation, t, prompt, switch)
            note = "no-thinking prompt"
        elif reasoning and reasoning.strip() not in output:
            note = LOST_REASONING
            if switch := self.habits.switch(True):
                thinking = self.render(conversation, t, True, **switch)
                reasoned = self._output(conversation, t, thinking, switch)
                if reasoning.strip() in reasoned:
                    prompt, output, note = thinking, reasoned, "thinking prompt"
        if switch and note != LOST_REASONING:
            note = f"{note} ({', '.join(f'{key}={value}' for key, value in switch.items())})"
        self._check(message, output, t)
        if not note and message["content"].strip() not in output:
            note = CHANGED
        return self._ended(prompt, output, note)

    def _lacks_opening(self, conversation: Conversation, t: int, prompt: str) -> bool:
        return not self.render(conversation, t + 1, False).startswith(prompt)

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
        tag = open_tag(opening) or open_tag(shared[-40:])
        closing = close_tag(tag)
        if not tag or tail.lstrip().startswith(closing):
            return tail  # the prompt's header is complete, or the full text closes the thought itself
        reasoning = next((message[key] for key in REASONING if message.get(key)), None)
        if reasoning is not None:
            return reasoning.strip("\n") + self.habits.closing(tag) + tail
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
        if lead is None or "tool_calls" in message or not message["content"].strip():
            raise _unfaithful(prompt, full, t)
        at = self._content_begins(conversation, t, switch)
        if at is None or message["content"].strip() not in full[at:]:
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
        return self._ended(full[:at], full[at:], "")

    def _check(self, message: dict[str, Any], output: str, t: int) -> None:
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in output:
                raise RowError(f"turn {t}: the {self.name} does not render tool calls: nothing of {call!r} is left")

    def _ended(self, prompt: str, output: str, note: str) -> Turn:
        """The turn with its output cut after the stop token."""
        ending, splitting = self.habits.ending, self._tokenizer.splitting
        if ending.stop is not None and ending.stop in output and not ending.unwritten:
            return Turn(prompt, output[: output.rfind(ending.stop) + len(ending.stop)], True, note)
        last = next(reversed(list(splitting.finditer(output))), None)
        if last and self._tokenizer.is_special(last.group()) and not output[last.end() :].strip():
            return Turn(prompt, output[: last.end()], True, note)
        if ending.unwritten:
            return Turn(prompt, output + ending.unwritten, True, note)
        return Turn(prompt, output.removesuffix(ending.written), False, note)


def as_read(message: Any) -> dict[str, Any]:
    """A message as a template reads it: without our own fields, reasoning under each of its usual names."""
    plain = {key: value for key, value in message.items() if key not in ("weight", "train") and value is not None}
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _reasoning(message: dict[str, Any], tag: str) -> str:
    """The thought of a turn, from its own field or from its content; "" if it has none."""
    for key in REASONING:
        if message.get(key):
            return message[key]
    closing = close_tag(tag)
    return (
        message["content"].partition(closing)[0].rpartition(tag)[2] if closing and closing in message["content"] else ""
    )


def _unfaithful(prompt: str, full: str, t: int) -> RowError:
    at = max(len(common(prompt, full)) - 40, 0)
    return RowError(
        f"turn {t}: the chat template does not continue the prompt that a server would send.\n"
        f"  prompt:       ...{prompt[at:][:200]!r}\n  conversation: ...{full[at:][:200]!r}"
    )
