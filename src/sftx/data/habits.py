"""The habits of a chat template, learned from a few probes: how a turn ends, and whether the prompt opens a thought."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sftx.data.conversation import REASONING
from sftx.data.sandbox import TEMPLATE_ERRORS, LimitError
from sftx.data.tokenizer import Tokenizer
from sftx.types import UserError

USER, MODEL, THOUGHT, NEXT = "qzuserqz", "qzmodelqz", "qzthoughtqz", "qznextqz"
TOOL = {"name": "qztool", "description": "qz", "parameters": {"type": "object", "properties": {}, "required": []}}
TOOLS = [{"type": "function", "function": TOOL}]
# Thoughts that are not marked by a pair of tags of the usual form.
_ODD_TAGS = {"<|channel>thought": "<channel|>", "Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]"}
_OPEN = re.compile(
    "|".join(map(re.escape, _ODD_TAGS)) + r"|<\|?(?!end)[^<>\s/|]*(?:think|thought|reason)[^<>\s/|]*\|?>|\[THINK\]",
    re.IGNORECASE,
)
_BEGINS = re.compile("start|begin|user|assistant|chatbot|system", re.IGNORECASE)  # in names of tokens that open a turn
_PARTIAL = re.compile(r"[<\[][^<>\[\]\s]*$")  # a tag that is not complete
_SWITCHES = ("enable_thinking", "thinking", "enable_reasoning")

Render = Callable[[Sequence[dict[str, Any]], Any, bool, dict[str, Any]], str]


def says(role: str, content: Any) -> dict[str, Any]:
    """A message of a probe."""
    return {"role": role, "content": content}


def calls(arguments: Any) -> dict[str, Any]:
    """An answer that calls the tool of the probes."""
    call = {"type": "function", "id": "call00000", "function": {"name": TOOL["name"], "arguments": arguments}}
    return {**says("assistant", ""), "tool_calls": [call]}


def result(content: str) -> dict[str, Any]:
    """What that tool answers."""
    return {**says("tool", content), "name": TOOL["name"], "tool_call_id": "call00000"}


_USER, _MODEL = says("user", USER), says("assistant", MODEL)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a plain output ends: its stop token, if there is one; the text the template writes after the output; the text
    to add where a template writes the stop token only before a next turn."""

    stop: str | None
    written: str
    unwritten: str = ""


class Habits:
    """What a template does, found by rendering small conversations with `render(messages, tools, generate, kwargs)`."""

    def __init__(self, source: str, tokenizer: Tokenizer, render: Render, name: str):
        self._source = source
        self._tokenizer = tokenizer
        self._render = render
        self._name = name

    def _try(self, *messages: dict[str, Any], generate: bool = False, tools: Any = None, **kwargs: Any) -> str | None:
        """A probe: None where the template refuses it."""
        if tools is None and self.needs_tools:
            tools = TOOLS
        return self._raw([self.shaped(message) for message in messages], tools, generate, kwargs)

    def _raw(self, messages: Any, tools: Any = None, generate: bool = False, kwargs: Any = None) -> str | None:
        """A probe whose messages stay in the shape they have."""
        try:
            return self._render(messages, tools, generate, kwargs or {})
        except LimitError as error:  # for the few words of a probe: it is not tried any further
            raise UserError(f"the {self._name} cannot be used: for two or three short messages {error}") from error
        except TEMPLATE_ERRORS:
            return None

    @cached_property
    def needs_tools(self) -> bool:
        """Whether the template only renders conversations that come with tools."""
        return self._raw([_USER], generate=True) is None

    def shaped(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message in the shape that this template can read."""
        if self.content_as_parts:
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        if "tool_calls" in message and self.arguments_as_text:
            calls = [{**c, "function": {**c["function"], "arguments": _json(c)}} for c in message["tool_calls"]]
            message = {**message, "tool_calls": calls}
        return message

    @cached_property
    def content_as_parts(self) -> bool:
        """Whether contents must be lists of parts: the template fails on text, or does not show it."""

        def shows(user: Any, model: Any) -> bool:
            text = self._raw([says("user", user), says("assistant", model)]) or ""
            return USER in text and MODEL in text

        parts = [[{"type": "text", "text": text}] for text in (USER, MODEL)]
        return not shows(USER, MODEL) and shows(*parts)

    @cached_property
    def arguments_as_text(self) -> bool:
        """Whether tool calls must carry their arguments as JSON text: the template fails on an object."""

        def fails(arguments: Any) -> bool:
            return self._raw([_USER, calls(arguments)], TOOLS) is None

        return fails({}) and not fails("{}")

    @cached_property
    def prompt(self) -> str:
        """The prompt for the answer to one plain question; "" if the template refuses it."""
        return self._try(_USER, generate=True) or ""

    @cached_property
    def full(self) -> str:
        """The text of one plain question and its answer."""
        return self._try(_USER, _MODEL) or ""

    @cached_property
    def lead(self) -> str | None:
        """What the template writes between the prompt and the content of the answer; None if it is no continuation."""
        if self.prompt and self.full.startswith(self.prompt) and MODEL in self.full:
            return self.full[len(self.prompt) : self.full.rfind(MODEL)]
        return None

    @cached_property
    def opening(self) -> str:
        """What the prompt holds after the place where the full text goes on with the answer; "" if nothing, or if the
        template already differs before the header of the answer."""
        shared = common(self.prompt, self.full)
        history = self._try(_USER) or ""
        begun = history != self.prompt and len(shared) < len(common(self.prompt, history))
        return "" if begun else self.prompt[len(shared) :]

    @cached_property
    def ending(self) -> Ending:
        """How a plain output ends.

        The stop token is one of the special tokens that directly follow the content: one at which generation stops, if
        it is known, else the last of those that also follow it when the conversation goes on.
        """
        written = self.full[self.full.rfind(MODEL) + len(MODEL) :] if MODEL in self.full else ""
        later = self._try(_USER, _MODEL, says("user", NEXT)) or ""
        between = later[later.rfind(MODEL) + len(MODEL) : later.rfind(NEXT)] if MODEL in later else ""
        stop = self._stop(written, between)
        if stop is not None:
            return Ending(stop, written)
        closing = _without_header(between, self.full[: self.full.find(USER)])
        stop = self._stop(closing, closing)
        first = self._tokenizer.control.search(between)
        if stop is None and first and self._tokenizer.backend.token_to_id(first.group()) in self._tokenizer.stop_ids:
            stop, closing = first.group(), between
        if stop is not None:
            return Ending(stop, written, closing[: closing.find(stop) + len(stop)])
        return Ending(None, written)

    @cached_property
    def unwritten_after_call(self) -> str:
        """`Ending.unwritten` for a tool call, behind which a result stands and not a user."""
        turns = _USER, calls({"qz": MODEL})
        newest = (self._try(*turns, tools=TOOLS) or "").rpartition(MODEL)[2]
        later = (self._try(*turns, result(NEXT), tools=TOOLS) or "").rpartition(MODEL)[2]
        first = self._tokenizer.control.search(later, len(newest)) if later.startswith(newest) else None
        known = first and self._tokenizer.backend.token_to_id(first.group()) in self._tokenizer.stop_ids
        return later[len(newest) : first.end()] if first and known else self.ending.unwritten

    def _stop(self, text: str, between: str) -> str | None:
        run: list[re.Match[str]] = []
        for match in self._tokenizer.control.finditer(text):
            if run and (match.start() > run[-1].end() or _BEGINS.search(match.group())):
                break
            run.append(match)
        found = [match.group() for match in run]
        known = [token for token in found if self._tokenizer.backend.token_to_id(token) in self._tokenizer.stop_ids]
        lasting = [token for token in found if token in between]
        return known[0] if known else (lasting or found or [None])[-1]

    @cached_property
    def thought(self) -> str:
        """The tag of a thought that the prompt leaves open; "" if it opens none."""
        return open_tag(self.prompt)

    @cached_property
    def switches(self) -> dict[bool, dict[str, Any]]:
        """The template's own setting that lets an answer begin with a thought (True) or not (False); {} if none."""
        return {thinking: self._switch(thinking) for thinking in (True, False)}

    def _switch(self, thinking: bool) -> dict[str, Any]:
        for key in _SWITCHES:
            if re.search(rf"\b{key}\b", self._source):
                prompt = self._try(_USER, generate=True, **{key: thinking}) or self.prompt
                if prompt != self.prompt and (thinking or not open_tag(prompt)):
                    return {key: thinking}
        return {}

    def closing(self, tag: str) -> str:
        """The text between a thought and the answer: as the template writes it, else the usual one."""
        full = self._try(_USER, {**_MODEL, **dict.fromkeys(REASONING, THOUGHT)}) or ""
        if THOUGHT in full and close_tag(tag) in full:
            lead = self.full[len(self.prompt) - len(self.opening) : self.full.rfind(MODEL)]
            return full[full.rfind(THOUGHT) + len(THOUGHT) : full.rfind(MODEL)].removesuffix(lead)
        line = "\n" if re.search(re.escape(tag) + r"\n", self.prompt) else ""
        return f"{line}{close_tag(tag)}{line * 2}"

    def closed_at_once(self, opening: str, tag: str) -> str:
        """What closes a thought just opened: as the template writes an empty thought, else the usual closing."""
        source = self._source.replace("\\n", "\n")
        written = re.search(rf"{re.escape(tag)}\s*{re.escape(close_tag(tag))}\s*(?=['\"])", source)
        begun = opening[opening.find(tag) :]
        if written and written.group().startswith(begun):
            return written.group()[len(begun) :]
        return self.closing(tag)


def _json(call: dict[str, Any]) -> str:
    return json.dumps(call["function"]["arguments"], ensure_ascii=False)


def common_length(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common(first: str, second: str) -> str:
    """The common beginning of two texts, never ending inside a tag."""
    length = common_length(first, second)
    partial = _PARTIAL.search(first[max(0, length - 100) : length])
    return first[: length - (len(partial.group()) if partial else 0)]


def _without_header(between: str, before: str) -> str:
    """The text between two turns without what stands `before` every user's turn; whole tags only."""
    end = len(between) - common_length(between[::-1], before[::-1])
    if _PARTIAL.search(between[:end]):
        end = re.compile(r"[>\]]").search(between, end).end()  # type: ignore[union-attr]
    return between[:end]


def close_tag(tag: str) -> str:
    """`</think>` for `<think>`, `[/THINK]` for `[THINK]`, `<|END_THINKING|>` for `<|START_THINKING|>`; "" for ""."""
    if tag in _ODD_TAGS or not tag:
        return _ODD_TAGS.get(tag, "")
    for begin, end in (("START", "END"), ("start", "end"), ("begin", "end")):
        if begin in tag:
            return tag.replace(begin, end)
    return f"{tag[0]}/{tag[1:]}"


def last_tag(text: str) -> tuple[str, bool]:
    """The last thought tag that opens in `text` ("" if none does), and whether the thought is also closed there."""
    last = next(reversed(list(_OPEN.finditer(text))), None)
    return ("", False) if last is None else (last.group(), close_tag(last.group()) in text[last.end() :])


def open_tag(prompt: str) -> str:
    """The tag of the thought that `prompt` ends in; "" if it does not end in one."""
    tag, closed = last_tag(prompt[-80:])
    return tag if tag and not closed and prompt.rstrip().endswith(tag) else ""
