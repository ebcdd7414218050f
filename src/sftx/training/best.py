"""Which evaluation of a run was the best, and for how many there was no gain since.

An evaluation is the numbers of one step. That of step 0, before training, does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sftx.settings.schema import Eval

Evaluations = Mapping[int, Mapping[str, float]]
"""The numbers of each evaluation, by its step."""


def chosen_by(settings: Eval) -> str | None:
    """The number by which the model is chosen that is written; None = the last one is."""
    return settings.keep_best or ("loss" if settings.stop_after else None)


def lower_is_better(name: str) -> bool:
    """Whether a number is to be low: losses, perplexity and kl; all others are to be high."""
    return name in ("perplexity", "kl", "general loss") or name.split(" of ")[0] == "loss"


def costs(evaluations: Evaluations, name: str) -> dict[int, float]:
    """The number `name` of each evaluation that has it, by step; the sign makes the lowest best."""
    sign = 1.0 if lower_is_better(name) else -1.0
    return {
        step: sign * numbers[name]
        for step, numbers in sorted(evaluations.items())
        if step > 0 and math.isfinite(numbers.get(name, math.nan))
    }


def best_step(evaluations: Evaluations, name: str) -> int | None:
    """The step of the best evaluation, of equal ones the first; None where none has the number."""
    found = costs(evaluations, name)
    return min(found, key=found.__getitem__, default=None)


def without_gain(evaluations: Evaluations, name: str, min_delta: float) -> int:
    """How many evaluations in a row, up to the last, did not gain more than `min_delta` over the
    best before.
    """
    best = math.inf
    count = 0
    for cost in costs(evaluations, name).values():
        count += 1
        if best - cost > min_delta:
            best = cost
            count = 0
    return count
