"""The opening tag of a thought at the begin of a text that is still coming in."""

from __future__ import annotations

from sftx.data.chat.thoughts import ODD_TAGS, OPEN


def tag_at_start(text: str) -> str:
    """The opening tag of a thought with which a text begins; "" if it begins with none."""
    found = OPEN.match(text)
    return found.group() if found else ""


def may_begin_tag(text: str) -> bool:
    """Whether a text can become one that begins with an opening tag when more of it has come."""
    if any(tag.startswith(text) for tag in ODD_TAGS):
        return True
    return text[0] in "<[" and not any(sign in text[1:] for sign in "<>[] \n")
