"""One row of the table: what was asked, how it was measured, what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["equal", "differs", "not applicable"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A property and its verdict. `differences` holds the largest difference of each number that was
    compared, `limits` what rounding explains; `why` says why a property does not apply, or what
    differs.
    """

    what: str
    how: str
    verdict: Verdict
    differences: dict[str, float] = field(default_factory=dict[str, float])
    limits: dict[str, float] = field(default_factory=dict[str, float])
    why: str = ""

    def largest(self) -> str:
        """The differences in words: `loss 2.1e-08, gradient 3.0e-07`."""
        if not any(self.differences.values()):
            return "none" if self.differences else ""
        return ", ".join(f"{name} {value:.2g}" for name, value in self.differences.items())


def compared(
    what: str,
    how: str,
    differences: Mapping[str, float],
    limits: Mapping[str, float],
    why: str = "",
) -> Finding:
    """A finding by its numbers: it differs where one is beyond its limit, or is no number."""
    within = all(value <= limits[name] for name, value in differences.items())
    verdict: Verdict = "equal" if within else "differs"
    return Finding(what, how, verdict, dict(differences), dict(limits), why)


def counted(what: str, how: str, wrong: int, of: str, first: str = "") -> Finding:
    """A finding by a count of what is wrong; `of` says among what, `first` shows the first case."""
    verdict: Verdict = "differs" if wrong else "equal"
    return Finding(what, f"{how} ({of})", verdict, {"cases": float(wrong)}, {"cases": 0.0}, first)


def does_not_apply(what: str, how: str, why: str) -> Finding:
    """A property that this model or data does not have."""
    return Finding(what, how, "not applicable", why=why)
