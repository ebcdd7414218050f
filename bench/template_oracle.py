"""What a trained turn must be, worked out with transformers alone: nothing of sftx is used here.

`Oracle` renders the messages of one conversation with `apply_chat_template`, in the shape in which
the template shows them best, and says what is wrong with a trained turn: its prompt is not the
served one, its output is not the text that the full rendering adds, its stop token is another, a
call, a thought or a part of the content is missing or doubled.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
SWITCHES = ("enable_thinking", "thinking", "enable_reasoning")
THOUGHT_TAG = re.compile(
    r"<\|?[^<>\s|/]*(?:think|thought|reason)[^<>\s|]*\|?>|\[THINK\]|<\|channel>thought|"
    r"Here are my reasoning steps:",
    re.IGNORECASE,
)
CLOSE_TAG = re.compile(
    r"</think>|<\|END_THINKING\|>|\[/THINK\]|</seed:think>|<\|/?think_end\|>|<\|inner_suffix\|>|<channel\|>"
    r"|\[BEGIN FINAL RESPONSE\]"
)
HTML = re.compile(r"&#\d+;|&(?:quot|amp|lt|gt|apos);")
PARTIAL_TAG = re.compile(r"(?:[<\[][^<>\[\]\s]*)?$")
QUESTION = {"role": "user", "content": "qzquestionqz"}
NEXT = {"role": "user", "content": "qznextqz"}
PLAIN = {"role": "assistant", "content": "qzplainqz"}


@dataclass(frozen=True)
class Trained:
    """One trained turn: its place in the messages, the ids before it, its text, and the text of its
    last token.
    """

    t: int
    prompt: list[int]
    output: str
    last: str


class Oracle:
    """One conversation as transformers renders it with one template."""

    def __init__(self, theirs: Any, source: str, messages: list[Any], tools: list[Any]):
        self._theirs = theirs
        self._source = source
        self._tools = tools or None
        self._given = [_as_sent(message) for message in messages]
        shapes = [(parts, as_text) for parts in (False, True) for as_text in (False, True)]
        rated = [(self._faults(shape), shape) for shape in shapes]
        self._shape = min(rated, key=lambda pair: pair[0])[1]
        self.messages = [_shaped(message, self._shape) for message in self._given]

    def _faults(self, shape: tuple[bool, bool]) -> int:
        """How badly the template shows the conversation when its messages have this shape; 1000 =
        not at all.
        """
        text = self._render([_shaped(message, shape) for message in self._given], False, {})
        if text is None:
            return 1000
        faults = 0
        for message in self._given:
            faults += message["content"].strip() not in text
            for call in message.get("tool_calls", ()):
                leaves = list(_leaves(_arguments(call)))
                faults += any(not _shows(text, leaf) for leaf in leaves)
                faults += bool(HTML.search(text))
                faults += any(f"'{key}':" in text for key in _arguments(call))
                faults += '{\\"' in text
        return faults

    def _render(
        self, messages: list[Any], generate: bool, switch: dict[str, Any], tokenize: bool = False
    ) -> Any:
        try:
            return self._theirs.apply_chat_template(
                messages,
                tools=self._tools,
                chat_template=self._source,
                add_generation_prompt=generate,
                tokenize=tokenize,
                return_dict=False,
                **switch,
            )
        except REFUSALS:
            return None

    def text(self, end: int, *, generate: bool, **switch: Any) -> str | None:
        """The text of the first `end` messages; None if the template refuses them."""
        return self._render(self.messages[:end], generate, switch)

    def ids(self, end: int, *, generate: bool, **switch: Any) -> list[int] | None:
        """The ids of the first `end` messages; None if the template refuses them."""
        return self._render(self.messages[:end], generate, switch, tokenize=True)

    def _prompt(self, t: int, switch: dict[str, Any]) -> str | None:
        """The served prompt of turn `t`. Before a first answer it is what the template writes
        before the answer, as far as that ends in the header of an answer.
        """
        asked = self.text(t, generate=True, **switch)
        if asked is not None or t > 0:
            return asked
        full, content = self.text(1, generate=False, **switch), self._given[0]["content"].strip()
        if not full or content not in full or not self._header.strip():
            return None
        before, _, opening = full[: full.find(content)].rpartition(self._header)
        of_thought = CLOSE_TAG.search(opening) or THOUGHT_TAG.search(opening)
        return (
            before + self._header
            if not opening.strip() or opening == self._lead or of_thought
            else None
        )

    @cached_property
    def _header(self) -> str:
        """What opens the answer to a plain question, without a thought that it opens."""
        question = _shaped(QUESTION, self._shape)
        asked, told = self._render([question], True, {}), self._render([question], False, {})
        if asked is None or told is None:
            return ""
        shared = commonprefix([asked, told])  # noqa: RUF071 (of letters)
        partial = PARTIAL_TAG.search(shared)
        assert partial is not None
        shared = shared[: len(shared) - len(partial.group())]
        return THOUGHT_TAG.split(asked[len(shared) :])[0]

    @cached_property
    def _shows_text(self) -> bool:
        """Whether the template shows contents that are texts."""
        text = self._render([QUESTION, PLAIN], False, {})
        return text is not None and QUESTION["content"] in text and PLAIN["content"] in text

    @cached_property
    def _lead(self) -> str:
        """What the template writes between the header and a plain answer."""
        talk = [_shaped(message, self._shape) for message in (QUESTION, PLAIN)]
        return (
            (self._render(talk, False, {}) or "")
            .partition(PLAIN["content"])[0]
            .rpartition(self._header)[2]
        )

    def _specials(self, text: str) -> list[re.Match[str]]:
        return list(self._special.finditer(text))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        tokens = self._theirs.added_tokens_decoder.values()
        texts = sorted((token.content for token in tokens if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)))

    @cached_property
    def _plain_stops(self) -> list[str]:
        """The special tokens between a plain answer and the next question, without the header of
        the question.
        """
        talk = [_shaped(message, self._shape) for message in (QUESTION, PLAIN, NEXT)]
        later, once = self._render(talk, False, {}), self._render(talk[:1], False, {})
        if (
            later is None
            or once is None
            or PLAIN["content"] not in later
            or NEXT["content"] not in later
        ):
            return []
        between = later[
            later.rfind(PLAIN["content"]) + len(PLAIN["content"]) : later.rfind(NEXT["content"])
        ]
        before = once[: once.rfind(QUESTION["content"])]
        tokens = [match.group() for match in self._specials(between)]
        opening = [match.group() for match in self._specials(before)]
        while opening and len(tokens) > 1 and tokens[-1] == opening[-1]:
            tokens.pop()
            opening.pop()
        return tokens

    @cached_property
    def _trailing(self) -> str:
        """What the template writes behind a plain answer at the end of a conversation, from its
        stop token on.
        """
        talk = [_shaped(message, self._shape) for message in (QUESTION, PLAIN)]
        return (self._render(talk, False, {}) or "").rpartition(PLAIN["content"])[2]

    def refused_wrongly(self) -> list[str]:
        """Why a refusal of the whole conversation is wrong; empty if transformers cannot render it
        whole either.
        """
        if self._shape[0] and self._shows_text:
            # It can only be rendered in a shape that no server would send to this template
            return []
        for t, message in enumerate(self._given):
            if message["role"] != "assistant":
                continue
            prompt, full = self._prompt(t, {}), self.text(t + 1, generate=False)
            if prompt is None or full is None or not self._asked(t, prompt):
                return []
            specials = self._specials(prompt)
            tail = prompt[specials[-1].start() :] if specials else prompt
            at = len(prompt) if full.startswith(prompt) else full.rfind(tail) + len(tail)
            if at < len(tail) or self._missing(message, full[at:], True):
                return []
            if t > 0 and not full.startswith(prompt) and self._given[t - 1]["content"] in full[at:]:
                return []  # the answers before and here are written as one
        return ["refused, although every turn continues its prompt and is whole"]

    def _asked(self, t: int, prompt: str) -> bool:
        """Whether a prompt asks for an answer: behind an answer or a system message it must write a
        header.
        """
        if t == 0 or self._given[t - 1]["role"] in ("user", "tool"):
            return True
        return prompt != self.text(t, generate=False)

    def _missing(self, message: dict[str, Any], output: str, with_calls: bool) -> list[str]:
        """What of a message is not in its output, or is there in another form."""
        found = []
        if message["content"].strip() not in output:
            found.append("the content is missing")
        if HTML.search(output) and not HTML.search(json.dumps(message, ensure_ascii=False)):
            found.append("HTML escapes")
        calls = message.get("tool_calls", ()) if with_calls else ()
        names = [call["function"]["name"] for call in calls]
        for k, call in enumerate(calls):
            where = f"call {k + 1} of {len(calls)}"
            name, arguments = names[k], _arguments(call)
            if output.count(name) < names.count(name):
                found.append(f"{where}: its name is missing")
            found += [
                f"{where}: {leaf!r} is missing"
                for leaf in _leaves(arguments)
                if not _shows(output, leaf)
            ]
            words = [
                leaf for leaf in arguments.values() if isinstance(leaf, str) and leaf.isalpha()
            ]
            found += [
                f"{where}: {word!r} stands there more often than in the calls"
                for word in words
                if output.count(word) > sum(word in _leaves(_arguments(each)) for each in calls)
            ]
            found += [f"{where}: not as JSON" for key in arguments if f"'{key}':" in output]
        return found

    def wrongs(self, trained: Trained, switch: dict[str, Any], lost: bool) -> list[str]:
        """All that is wrong with a trained turn. `switch`: what its note names; `lost`: the row
        says that a thought is left out.
        """
        kwargs = switch
        served = self._served(trained.t, switch)
        if trained.prompt != served and switch:
            kwargs, served = {}, self._served(trained.t, {})
        if trained.prompt != served:
            shown = "a refusal" if served is None else repr(self._theirs.decode(served))
            return [
                f"turn {trained.t}: prompt {self._theirs.decode(trained.prompt)!r} is not {shown}"
            ]
        prompt = self._prompt(trained.t, kwargs)
        full = self.text(trained.t + 1, generate=False, **kwargs)
        if prompt is None or full is None:
            return [f"turn {trained.t}: transformers refuses it"]
        message = self._given[trained.t]
        found = self._missing(message, trained.output, True)
        found += self._of_thought(trained, message, lost)
        found += self._of_header(trained, message)
        found += self._of_text(trained, message, prompt, full)
        found += [f"ends in {trained.last!r}"] if not self._special.fullmatch(trained.last) else []
        return [f"turn {trained.t}: {what}: {trained.output!r}" for what in found]

    def _served(self, t: int, switch: dict[str, Any]) -> list[int] | None:
        if t > 0:
            return self.ids(t, generate=True, **switch)
        prompt = self._prompt(0, switch)
        return None if prompt is None else self._theirs.encode(prompt, add_special_tokens=False)

    def _of_thought(self, trained: Trained, message: dict[str, Any], lost: bool) -> list[str]:
        thought = message.get("reasoning_content", "")
        closings = len(CLOSE_TAG.findall(trained.output))
        found = ["a thought is closed twice"] if closings > 1 else []
        if thought and trained.output.count(thought) > 1:
            found.append("the thought stands there twice")
        if not thought or thought in trained.output:
            return found
        for switch in [{}, *({name: True} for name in SWITCHES)]:
            prompt = self._prompt(trained.t, switch)
            full = self.text(trained.t + 1, generate=False, **switch)
            if prompt and full and thought in full and not CLOSE_TAG.search(prompt[-40:]):
                return [*found, "the thought is rendered, but not trained"]
        return found if lost else [*found, "a thought is missing without a note"]

    def _of_header(self, trained: Trained, message: dict[str, Any]) -> list[str]:
        """No header of a turn is part of an output, but between the parts of one turn."""
        header = self._header.strip()
        if not header or not self._special.search(header):
            return []
        if trained.output.lstrip().startswith(header):
            return ["begins with its own header"]
        alone = [_shaped(QUESTION, self._shape), self.messages[trained.t]]
        text = self._render(alone, False, {})
        once = 1 if text is None else text.count(header)
        return ["holds a header"] if trained.output.count(header) >= max(once, 1) else []

    def _of_text(
        self, trained: Trained, message: dict[str, Any], prompt: str, full: str
    ) -> list[str]:
        """Whether the output is the text of the full rendering, up to the stop token."""
        body = trained.output.removesuffix(trained.last)
        thought = message.get("reasoning_content", "")
        things = [thought, message["content"].strip(), *_words(message)]
        places = [
            trained.output.find(thing) for thing in things if thing and thing in trained.output
        ]
        first = min(places, default=0)
        if full.startswith(prompt):
            begin, first = len(prompt), 0
            if (
                trained.t > 0
                and self._given[trained.t - 1]["role"] == "tool"
                and full.startswith(self._header, begin)
            ):
                begin += len(self._header)  # behind a result the model goes on without a header
        else:
            begin = full.rfind(body[first:]) if body[first:] else -1
            if body[first:].strip() == "":
                begin = -1
            elif begin < 0:
                return self._closed_by_hand(trained, full, first, thought)
            lead = trained.output[:first]
            closing = CLOSE_TAG.match(lead.lstrip())
            written = lead.lstrip().removeprefix(closing.group()).lstrip() if closing else lead
            if begin >= 0 and not (full[:begin].endswith(written) or full[:begin].endswith(lead)):
                return [f"{lead!r} is not what the template writes before it"]
        if begin < 0:
            return []
        rest = full[begin:]
        said = trained.output[first:]
        if rest.startswith(said):
            after = rest[len(said) :]
            known = after in self._trailing or trained.last in self._plain_stops[-1:]
            if self._special.search(after) and not known:
                return [f"ends before {after!r}"]
            return []
        core = body[first:]
        if rest.startswith(core.rstrip("\n")) and not rest[len(core) :].strip():
            allowed = (
                {*self._plain_stops, self._theirs.eos_token}
                if not message.get("tool_calls")
                else None
            )
            return (
                []
                if allowed is None or trained.last in allowed
                else [f"stop token {trained.last!r}"]
            )
        return [f"the template writes {rest!r}"]

    def _closed_by_hand(self, trained: Trained, full: str, first: int, thought: str) -> list[str]:
        """Where a thought that the prompt opened was closed by the engine, the rest is still the
        template's text.
        """
        body = trained.output.removesuffix(trained.last)
        closing = CLOSE_TAG.search(body)
        rest = body[closing.end() :].strip() if closing else body[first:]
        return [] if rest in full else [f"the template writes {full[-len(rest) - 60 :]!r}"]


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its thought under every name that templates read."""
    if "reasoning_content" not in message:
        return message
    return {
        **message,
        "thinking": message["reasoning_content"],
        "reasoning": message["reasoning_content"],
    }


def _shaped(message: dict[str, Any], shape: tuple[bool, bool]) -> dict[str, Any]:
    """A message with its content as text or as parts, and its arguments as an object or as JSON
    text.
    """
    parts, as_text = shape
    if parts:
        message = {**message, "content": [{"type": "text", "text": message["content"]}]}
    if "tool_calls" in message:
        calls = []
        for call in message["tool_calls"]:
            arguments: Any = _arguments(call)
            if as_text:
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        message = {**message, "tool_calls": calls}
    return message


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _leaves(value: Any) -> list[Any]:
    """All texts, numbers and truth values inside a value, and the keys that lead to them."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *_leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _shows(text: str, leaf: Any) -> bool:
    """Whether a value stands in a text: as it is, or as inside JSON."""
    if isinstance(leaf, str):
        forms = {leaf, json.dumps(leaf)[1:-1], json.dumps(leaf, ensure_ascii=False)[1:-1]}
        forms |= {json.dumps(form, ensure_ascii=False)[1:-1] for form in list(forms)}
        return any(form in text for form in forms)
    return any(form in text for form in (json.dumps(leaf), str(leaf)))


def _words(message: dict[str, Any]) -> list[str]:
    return [call["function"]["name"] for call in message.get("tool_calls", ())]
