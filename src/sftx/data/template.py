"""A chat template, and the two texts that define a trained turn: what a server sends, and what the model must answer.

For turn t the prompt is `render(messages[:t], add_generation_prompt=True)` and the output is what
`render(messages[:t + 1])` adds to it, up to and including the stop token. `ChatTemplate` learns the habits of its
template from a few probes: its stop token, whether its prompt opens a thought, and how to close that again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from sftx.data.sandbox import TEMPLATE_ERRORS, compile_template, run_template
from sftx.data.tokenizer import Tokenizer
from sftx.types import RowError, UserError

_USER, _MODEL, _THOUGHT = "qzuserqz", "qzmodelqz", "qzthoughtqz"
_TOOL = {"name": "qztool", "description": "qz", "parameters": {"type": "object", "properties": {}, "required": []}}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OPEN = re.compile(r"(<\|?[^<>\s/|]*(?:think|thought|reason)[^<>\s/|]*\|?>|\[THINK\])", re.IGNORECASE)
_SWITCHES: tuple[tuple[str, Any], ...] = (
    ("enable_thinking", False),
    ("thinking", False),
    ("enable_reasoning", False),
    ("reasoning", False),
    ("reasoning_effort", "none"),
)
CLOSED, SWITCHED = "forced opening closed", "no-thinking prompt"
LOST_REASONING = "reasoning left out by the template"


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

    # ---- rendering

    def render(self, conversation: Conversation, end: int, generate: bool, **kwargs: Any) -> str:
        """The text of the first `end` messages, as transformers renders them. `RowError` if the template refuses."""
        if end == 0:
            raise RowError(
                "the conversation begins with an output, and no server can be asked for it: put a prompt first"
            )
        messages = conversation.messages[:end]
        if conversation.tools is not None or any("tool_calls" in message for message in messages):
            messages = [self._calls(message) for message in messages]
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

    def _try(self, messages: Sequence[Any], generate: bool, **kwargs: Any) -> str | None:
        """A probe: None where the template refuses it."""
        tools = [{"type": "function", "function": _TOOL}] if self.needs_tools else None
        try:
            return self._render(messages, tools, generate, kwargs)
        except TEMPLATE_ERRORS:
            return None

    def _calls(self, message: dict[str, Any]) -> dict[str, Any]:
        """Arguments of tool calls as text, for templates that cannot take them as objects."""
        if not self.arguments_as_text or "tool_calls" not in message:
            return message
        calls = []
        for call in message["tool_calls"]:
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        return {**message, "tool_calls": calls}

    # ---- what the probes teach

    @cached_property
    def needs_tools(self) -> bool:
        """Whether the template only renders conversations that come with tools."""
        try:
            self._render([_user()], None, True, {})
        except TEMPLATE_ERRORS:
            return True
        return False

    @cached_property
    def arguments_as_text(self) -> bool:
        """Whether tool calls must carry their arguments as JSON text: the template fails on an object."""

        def fails(arguments: Any) -> bool:
            call = {"type": "function", "id": "call00000", "function": {"name": "qztool", "arguments": arguments}}
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            tool = {"role": "tool", "content": "1", "name": "qztool", "tool_call_id": "call00000"}
            try:
                self._render([_user(), message, tool], [{"type": "function", "function": _TOOL}], True, {})
            except TEMPLATE_ERRORS:
                return True
            return False

        return fails({}) and not fails("{}")

    @cached_property
    def ending(self) -> tuple[str | None, str]:
        """The stop token after a plain output (None if there is none), and all the text that follows the output."""
        full = self._try([_user(), {"role": "assistant", "content": _MODEL}], False)
        if full is None or _MODEL not in full:
            return None, ""
        tail = full[full.rfind(_MODEL) + len(_MODEL) :]
        found = [match.group() for match in self._tokenizer.splitting.finditer(tail)]
        control = [text for text in found if self._tokenizer.is_special(text)]
        return next(iter(control or found), None), tail

    @property
    def stop_id(self) -> int | None:
        """The token that ends an output with this template: its stop token, else EOS."""
        stop = self.ending[0]
        return self._tokenizer.eos_id if stop is None else self._tokenizer.backend.token_to_id(stop)

    @cached_property
    def opening(self) -> str:
        """What the prompt adds after the point where the full text goes on with the output; "" if nothing."""
        prompt = self._try([_user()], True)
        full = self._try([_user(), {"role": "assistant", "content": _MODEL}], False)
        if prompt is None or full is None or full.startswith(prompt):
            return ""
        return prompt[len(_common(prompt, full)) :]

    @cached_property
    def opens_thought(self) -> str:
        """The tag of a thought that the prompt leaves open; "" if it opens none."""
        prompt = self._try([_user()], True) or ""
        return _open_tag(prompt[prompt.rfind(_USER) + len(_USER) :])

    @cached_property
    def switch(self) -> dict[str, Any]:
        """The template's own setting under which its prompt leaves no thought open; {} if it has none."""
        for key, value in _SWITCHES:
            if re.search(rf"\b{key}\b", self.source):
                prompt = self._try([_user()], True, **{key: value})
                if prompt is not None and not _open_tag(prompt[prompt.rfind(_USER) :]):
                    return {key: value}
        return {}

    @cached_property
    def _closing(self) -> str:
        """The text between a thought and the answer: as the template writes it, else the usual one."""
        message = {"role": "assistant", "content": _MODEL, **dict.fromkeys(_REASONING, _THOUGHT)}
        full = self._try([_user(), message], False) or ""
        if _THOUGHT in full:
            return full[full.rfind(_THOUGHT) + len(_THOUGHT) : full.rfind(_MODEL)]
        line = "\n" if self.opening.endswith("\n") else ""
        return f"{line}{_close_tag(self.opens_thought)}{line * 2}"

    @cached_property
    def _empty_thought(self) -> str:
        """What closes an opened thought at once: as the template writes an empty thought, else the usual closing."""
        tag = self.opens_thought
        source = self.source.replace("\\n", "\n")
        written = re.search(rf"{re.escape(tag)}\s*{re.escape(_close_tag(tag))}\s*(?=['\"])", source)
        opening = self.opening[self.opening.find(tag) :]
        if written and written.group().startswith(opening):
            return written.group()[len(opening) :]
        return self._closing

    # ---- one turn

    def turn(self, conversation: Conversation, t: int) -> Turn:
        """Prompt and output of turn `t`. `RowError` if no faithful rendering exists."""
        message = conversation.messages[t]
        if message["role"] != "assistant":
            return self._other_turn(conversation, t)
        prompt = self.render(conversation, t, True)
        note = ""
        reasons = _has_reasoning(message, self.opens_thought)
        if self.opens_thought and not reasons and _open_tag(prompt[-len(self.opening or self.opens_thought) - 20 :]):
            if self._forced_opening == "error":
                raise RowError(
                    f"turn {t}: the prompt opens a thought ({self.opens_thought!r}) that the turn does not have; "
                    "data.forced_opening: close closes it"
                )
            note = CLOSED
        full = self.render(conversation, t + 1, False)
        if full.startswith(prompt):
            output = full[len(prompt) :]
        elif note and self.switch:
            prompt = self.render(conversation, t, True, **self.switch)
            output = self._continue(prompt, self.render(conversation, t + 1, False, **self.switch), message, t)
            note = f"{SWITCHED} ({', '.join(f'{k}={v}' for k, v in self.switch.items())})"
        else:
            output = self._continue(prompt, full, message, t)
        if not note and _loses_reasoning(message, output):
            note = LOST_REASONING
        return self._ended(prompt, output, note)

    def _continue(self, prompt: str, full: str, message: dict[str, Any], t: int) -> str:
        """What must follow a prompt that ends in an opening, given the full text, which has none."""
        if full.startswith(prompt):
            return full[len(prompt) :]
        common = _common(prompt, full)
        opening, tail = prompt[len(common) :], full[len(common) :]
        thought = _OPEN.search(opening) or _OPEN.search(common[-40:])
        if thought is None or not self._is_opening(opening):
            raise _unfaithful(prompt, full, t)
        tag = thought.group()
        closing = _close_tag(tag)
        if closing in opening:  # opened and closed: the answer follows
            return tail
        reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
        if reasoning is not None:
            return reasoning.strip("\n") + self._closing + tail
        content = message["content"]
        if closing in content:  # the thought stands in the content, and the template left it out
            body = content.lstrip().removeprefix(opening).removeprefix(tag)
            stop = self.ending[0]
            return body + (tail[tail.rfind(stop) :] if stop and stop in tail else "")
        if tail.lstrip().startswith(closing):  # the full text closes it itself
            return tail
        return self._empty_thought + tail

    def _is_opening(self, text: str) -> bool:
        return text == self.opening or _OPEN.search(text) is not None or not text.strip()

    def _other_turn(self, conversation: Conversation, t: int) -> Turn:
        """A turn that no model is asked for: its prompt ends where the content begins."""
        messages = [*conversation.messages[:t], {**conversation.messages[t], "content": _MODEL}]
        probe = self.render(Conversation(messages, [], conversation.tools, conversation.kwargs), t + 1, False)
        full = self.render(conversation, t + 1, False)
        at = probe.rfind(_MODEL)
        if at < 0 or not full.startswith(probe[:at]):
            raise _unfaithful(probe[: max(at, 0)], full, t)
        closing = probe[at + len(_MODEL) :]
        return self._ended(full[:at], full[at:], "", closing)

    def _ended(self, prompt: str, output: str, note: str, closing: str | None = None) -> Turn:
        """The turn with its output cut after the stop token."""
        stop, tail = self.ending
        if stop is not None and stop in output:
            return Turn(prompt, output[: output.rfind(stop) + len(stop)], True, note)
        last = None
        for last in self._tokenizer.splitting.finditer(output):
            pass
        if last and self._tokenizer.is_special(last.group()) and not output[last.end() :].strip():
            return Turn(prompt, output[: last.end()], True, note)
        return Turn(prompt, output.removesuffix(tail if closing is None else closing), False, note)


def _user() -> dict[str, str]:
    return {"role": "user", "content": _USER}


def as_read(message: Any) -> dict[str, Any]:
    """A message as a template reads it: without our own fields, reasoning under each of its usual names."""
    plain = {key: value for key, value in message.items() if key not in ("weight", "train") and value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _common(prompt: str, full: str) -> str:
    """The common beginning of two texts, never ending inside a tag."""
    low, high = 0, min(len(prompt), len(full))
    while low < high:
        middle = (low + high + 1) // 2
        if prompt[low:middle] == full[low:middle]:
            low = middle
        else:
            high = middle - 1
    partial = re.search(r"[<\[][^<>\[\]\s]*$", prompt[:low])
    return prompt[: partial.start() if partial else low]


def _close_tag(tag: str) -> str:
    """`</think>` for `<think>`, `[/THINK]` for `[THINK]`, `<|END_THINKING|>` for `<|START_THINKING|>`."""
    for begin, end in (("START", "END"), ("start", "end"), ("begin", "end")):
        if begin in tag:
            return tag.replace(begin, end)
    return f"{tag[0]}/{tag[1:]}" if tag else ""


def _open_tag(text: str) -> str:
    """The last thought opened in `text`, if it is not closed there."""
    tags = _OPEN.findall(text)
    return tags[-1] if tags and _close_tag(tags[-1]) not in text[text.rfind(tags[-1]) :] else ""


def _has_reasoning(message: dict[str, Any], tag: str) -> bool:
    return any(message.get(key) for key in _REASONING) or bool(tag and _close_tag(tag) in message["content"])


def _loses_reasoning(message: dict[str, Any], output: str) -> bool:
    reasoning = next((message[key] for key in _REASONING if message.get(key)), "")
    return reasoning.strip() not in output


def _unfaithful(prompt: str, full: str, t: int) -> RowError:
    at = max(len(_common(prompt, full)) - 40, 0)
    return RowError(
        f"turn {t}: the chat template does not continue the prompt that a server would send.\n"
        f"  prompt:       ...{prompt[at:][:200]!r}\n  conversation: ...{full[at:][:200]!r}"
    )
