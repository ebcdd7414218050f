"""Text of strangers (keys, paths, rows, messages), without what a terminal would obey."""

from __future__ import annotations

import re

# Control characters but tab and new line, marks that turn the direction of writing, halves of
# surrogate pairs.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` with what a terminal would obey, or could not print, written as an escape: `\\x1b`,
    `\\u202e`.
    """
    return _OBEYED.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
