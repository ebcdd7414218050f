"""What is likely wrong with the text of one row: secrets, foreign markers, refusals, answers cut
off, and the like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise

from sftx.types import Row

MOJIBAKE = re.compile(
    r"\ufffd|Ã[\x80-\xbf¡-¿]|Â[\xa0-\xbf]|â€[\x90-\x9f™œ“”˜¦\x9d]|ï»¿|ðŸ[\x80-\xbf˜™]"
)
SECRETS = re.compile(
    r"\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_\w{60,}|\bhf_[A-Za-z0-9]{30,}\b"
    r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAIza[0-9A-Za-z_-]{35}\b"
    r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
)
CARD = re.compile(r"(?<![\d.])\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}(?![\d.])")
MARKERS = re.compile(  # what chat templates write, and text should not hold
    r"<\|im_(?:start|end)\|>|<\|(?:start|end)_header_id\|>|<\|eot_id\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<\|(?:user|assistant|system|endoftext|end_of_text|begin_of_text|return|channel)\|>|<\|turn\|?>"
    r"|^### (?:Instruction|Response):|^(?:Human|Assistant): ",
    re.MULTILINE,
)
REFUSAL = re.compile(
    r"^\W*(?:i['’]m (?:\w+ )?sorry|i am (?:\w+ )?sorry|sorry|i apologi[sz]e|unfortunately)\b[^.!?\n]{0,80}"
    r"\b(?:can(?:no|['’])t|unable|not able|won['’]t|not comfortable)\b"
    r"|^\W*i (?:can(?:no|['’])t|won['’]t|am unable to|am not able to) "
    r"(?:help|assist|provide|fulfil|comply|create|generate|engage|answer|discuss|do that)"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    re.IGNORECASE,
)
HTML = re.compile(
    r"</?(?:div|span|br|li|ul|ol|td|tr|th|table|tbody|strong|em|h[1-6]|img|font|script|style|iframe)\b[^<>]*>"
    r"|</(?:p|a|b|i|u)>|<a\s[^<>]*href|&(?:nbsp|amp|lt|gt|quot|apos|#\d{2,6}|#x[0-9a-f]{2,5});",
    re.IGNORECASE,
)
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
UNFINISHED = re.compile(  # how no sentence ends
    r"(?:[,:(\[{“]|\b(?:a|an|and|as|at|because|but|by|for|from|in|is|of|or|that|the|to|which|with))$",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?][\"”’')]*(?:\s|$)")
LIST_ITEM = re.compile(r"\s*(?:[-*•#|>]|\d+[.)])")
LONG = 20  # words; a shorter answer may end as it likes
ECHO = 4  # words that a prompt must have for its repetition to count


def texts(row: Row) -> Iterator[tuple[str, str]]:
    """(text, role of its speaker) of all that a row says, in order; plain text is the assistant's."""
    if row.text:
        yield row.text, "assistant"
    yield from ((phrase.text, "assistant" if phrase.weight else "user") for phrase in row.phrases)
    for message in row.messages:
        role = message.get("role", "")
        yield message.get("content", ""), role
        yield message.get("reasoning_content", ""), role
        yield from (
            (json.dumps(call, ensure_ascii=False), role) for call in message.get("tool_calls", ())
        )


def problems(row: Row, text: str, control: re.Pattern[str]) -> Iterator[str]:
    """The names of the problems of a row whose whole text is `text`."""
    if _wrong_order(row):
        yield "roles"
    if row.kind == "tokens":  # the text is that of numbers
        return
    if control.search(text):
        yield "own markers"
    if _has_foreign_marker(text, control):
        yield "markers"
    if MOJIBAKE.search(text):
        yield "mojibake"
    if SECRETS.search(text) or _has_card(text):
        yield "secrets"
    found: set[str] = set()
    for question, answer in _answers(row):
        found.update(_problems_of_answer(question, answer))
    yield from sorted(found)


def _has_foreign_marker(text: str, control: re.Pattern[str]) -> bool:
    found = [match.group() for match in MARKERS.finditer(text)]
    return not all(control.fullmatch(marker) for marker in found)


def _has_card(text: str) -> bool:
    return any(_luhn(match.group()) for match in CARD.finditer(text))


def _answers(row: Row) -> Iterator[tuple[str, str]]:
    """Every answer with the text before it."""
    said = (
        [(phrase.text, bool(phrase.weight)) for phrase in row.phrases]
        if row.kind == "phrases"
        else []
    )
    said += [
        (message.get("content", ""), message.get("role") == "assistant") for message in row.messages
    ]
    before = ""
    for text, is_answer in said:
        if is_answer:
            yield before, text
        before = text


def _problems_of_answer(question: str, answer: str) -> Iterator[str]:
    if REFUSAL.search(answer):
        yield "refusals"
    if HTML.search(CODE.sub("", answer)):
        yield "html"
    if _is_cut_off(answer):
        yield "cut off"
    asked = " ".join(question.lower().split())
    said = " ".join(answer.lower().split())
    if len(asked.split()) >= ECHO and said.startswith(asked):
        yield "echo"


def _is_cut_off(answer: str) -> bool:
    """Whether an answer stops in the middle: in a block of code, in a list of words, or in a
    sentence of prose.
    """
    if answer.count("```") % 2:
        return True
    text = answer.rstrip()
    if len(text.split()) < LONG or text.endswith("```"):
        return False
    last = text.rpartition("\n")[2]
    if UNFINISHED.search(last):
        return True
    is_prose = (
        len(SENTENCE_END.findall(text)) >= 2
        and not LIST_ITEM.match(last)
        and len(last.split()) >= 8
    )
    return is_prose and last[-1].isalnum()


def _luhn(text: str) -> bool:
    """Whether digits carry the check digit of a card number, and are not all alike."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d if i % 2 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)]
    return sum(doubled) % 10 == 0 and len(set(digits)) > 3


def _wrong_order(row: Row) -> bool:
    """System not first, the same speaker twice in a row, a tool result nobody asked for, or no
    answer at the end.
    """
    if not row.messages:
        return False
    roles = [message["role"] for message in row.messages]
    if roles[-1] != "assistant":
        return True
    return _has_late_system(roles) or _is_any_twice(roles) or _has_unasked_result(row)


def _has_late_system(roles: list[str]) -> bool:
    if roles[:2] == ["system", "developer"]:
        return False
    return any(role in ("system", "developer") for role in roles[1:])


def _is_any_twice(roles: list[str]) -> bool:
    """Whether one speaker speaks twice in a row."""
    return any(a == b and a in ("user", "assistant", "system") for a, b in pairwise(roles))


def _has_unasked_result(row: Row) -> bool:
    is_asked = False
    for message in row.messages:
        is_result = message["role"] == "tool"
        if is_result and not is_asked:
            return True
        is_asked = is_result or bool(message.get("tool_calls"))
    return False
