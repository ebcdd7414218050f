"""Whether the tool calls of a message stand in its output: every one of them, whole, and once."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator

from sftx.data.chat.conversation import ChatMessage
from sftx.types import Function, Json

_TELLING = 10  # characters; shorter arguments may also stand in a text that is no call
HTML_ESCAPE = re.compile(r"&#\d+;|&(?:quot|amp|lt|gt|apos);")


def lost_call(message: ChatMessage, output: str) -> str:
    """What is wrong with the calls of `message` in `output`, as in "call 2 of 3 (f) is missing"; ""
    if nothing is.

    What the content and the thought say too is not taken for a call.
    """
    calls = _functions(message)
    if not calls:
        return ""
    texts = [message["content"], message.get("reasoning_content", "")]
    said = [text for text in texts if text in output]
    needed: Counter[str] = Counter()
    for number, call in enumerate(calls, 1):
        where = f"call {number} of {len(calls)} ({call['name']})"
        fewest = len(output)
        for text, forms in _parts(call):
            needed[text] += 1
            spoken = sum([other.count(text) for other in said])
            written = max([output.count(form) for form in forms])
            if written < needed[text] + spoken:
                return f"{where} is missing or not whole: {text[:80]!r} is not there"
            fewest = min(fewest, written)
        # What stands there twice has all its parts there twice.
        if fewest > 1 and _is_doubled(call, calls, output):
            return f"{where} stands there more than once"
    return ""


def _functions(message: ChatMessage) -> list[Function]:
    """The functions that a message calls."""
    return [call["function"] for call in message.get("tool_calls", ())]


def _is_doubled(call: Function, calls: list[Function], output: str) -> bool:
    """Whether an output has the arguments of a call more often than its message."""
    arguments = call["arguments"]
    whole = json.dumps(arguments, ensure_ascii=False)
    if len(whole) <= _TELLING:
        return False
    alike = [other for other in calls if other["arguments"] == arguments]
    return output.count(whole) > len(alike)


def _parts(call: Function) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The name and all that the arguments hold, each as text and in the forms that templates write
    it in.
    """
    yield call["name"], (call["name"],)
    for leaf in _leaves(call["arguments"]):
        if not isinstance(leaf, str):
            written = json.dumps(leaf)
            yield written, (written, str(leaf))
        elif text := leaf.strip():
            yield text, _forms(text)


def _forms(text: str) -> tuple[str, ...]:
    """A text as it is, inside JSON, and inside JSON that is a text inside JSON."""
    needs_no_escape = text.isprintable() and '"' not in text and "\\" not in text
    if needs_no_escape and text.isascii():
        return (text,)
    once = _inside_json(text)
    once_in_ascii = json.dumps(text)[1:-1]
    return (text, once, once_in_ascii, _inside_json(once), _inside_json(once_in_ascii))


def _inside_json(text: str) -> str:
    written = json.dumps(text, ensure_ascii=False)
    return written[1:-1]


def _leaves(value: Json) -> Iterator[Json]:
    """The keys, texts, numbers and truth values in a value of JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def has_new_escapes(output: str, message: ChatMessage) -> bool:
    """Whether an output holds HTML escapes such as `&#34;` that its message does not have."""
    if "&" not in output or not HTML_ESCAPE.search(output):
        return False
    written = json.dumps(message, ensure_ascii=False)
    return not HTML_ESCAPE.search(written)
