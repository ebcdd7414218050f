"""One line of what `sftx doctor` says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, whether it is in the way of training, and what to do.

    `figures` holds the same as numbers, for other programs: bytes, seconds, FLOP/s.
    """

    group: str
    name: str
    found: str
    state: State = "ok"
    advice: str = ""
    figures: dict[str, float] = field(default_factory=dict[str, float])


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:,.1f} GiB"
