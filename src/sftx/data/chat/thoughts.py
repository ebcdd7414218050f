"""The tags between which templates write a thought, and how a text that a prompt ends in opens or
closes one.
"""

from __future__ import annotations

import re

# Thoughts that are not marked by a pair of tags of the usual form.
ODD_TAGS = {
    "<|channel>thought": "<channel|>",
    "Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]",
}
OPEN = re.compile(
    "|".join(map(re.escape, ODD_TAGS))
    + r"|<\|?(?!end)[^<>\s/|]*(?:think|thought|reason)[^<>\s/|]*\|?>|\[THINK\]",
    re.IGNORECASE,
)
# Contents in which a template may see a thought.
_THOUGHT = re.compile(
    r"(?i:think\w*\|?>|thought\w*\|?>|reason\w*\|?>|<\|?channel)|\[/?THINK|\[BEGIN FINAL RESPONSE"
)


def close_tag(tag: str) -> str:
    """`</think>` for `<think>`, `[/THINK]` for `[THINK]`, `<|END_THINKING|>` for
    `<|START_THINKING|>`; "" for "".
    """
    if tag in ODD_TAGS or not tag:
        return ODD_TAGS.get(tag, "")
    for begin, end in (("START", "END"), ("start", "end"), ("begin", "end")):
        if begin in tag:
            return tag.replace(begin, end)
    return f"{tag[0]}/{tag[1:]}"


def opening_of(prompt: str) -> tuple[str, str]:
    """The thought that a prompt ends in, as (all of it, its opening tag); ("", "") if it ends in
    none.

    A thought that was opened and closed again at once counts too. It is open if the text does not
    hold its close tag.
    """
    window = prompt[-80:]
    found = list(OPEN.finditer(window))
    if not found:
        return "", ""
    last = found[-1]
    tag = last.group()
    inside = window[last.end() :].strip()
    if inside and inside != close_tag(tag):
        return "", ""
    return window[last.start() :], tag


def open_tag(prompt: str) -> str:
    """The tag of the open thought that a prompt ends in; "" if it does not end in one."""
    opening, tag = opening_of(prompt)
    if not tag or close_tag(tag) in opening:
        return ""
    return tag


def thought_in(content: str, tag: str) -> str:
    """The thought that a content holds between `tag` and its close tag; "" if it holds none."""
    closing = close_tag(tag)
    if not tag or closing not in content:
        return ""
    before_close = content.partition(closing)[0]
    return before_close.rpartition(tag)[2]


def block_in(prompt: str, output: str, thought: str) -> tuple[int, int] | None:
    """Where an output thinks, as (begin, end) without tags and the white space at them: at
    `thought`, where that is known and stands there, else up to the first close tag. None if it does
    not begin with a thought, nor the prompt opens one.
    """
    tag = open_tag(prompt)
    begin = 0
    if not tag:
        found = OPEN.match(output, len(output) - len(output.lstrip()))
        if found is None:
            return None
        tag = found.group()
        begin = found.end()
    at = output.find(thought, begin) if thought else -1
    if at >= 0:
        begin = at
        end = at + len(thought)
    else:
        end = output.find(close_tag(tag), begin)
    if end < 0:
        return None
    inside = output[begin:end]
    said = inside.strip()
    if not said:
        return None
    begin += inside.index(said)
    return begin, begin + len(said)


def may_think(content: str) -> bool:
    """Whether a template may see a thought in a content; most hold no character of a tag."""
    if "<" in content or ">" in content or "[" in content:
        return _THOUGHT.search(content) is not None
    return False
