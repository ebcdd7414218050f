"""Which evaluation is the best, and how long there was no gain: cases counted by hand."""

from __future__ import annotations

import math

import pytest

from sftx.training.best import best_step, lower_is_better, without_gain


def evaluations(name: str, values: list[float | None]) -> dict[int, dict[str, float]]:
    """One evaluation every ten steps, the first before training; None = without the number."""
    return {
        10 * i: {"other": 0.0} if value is None else {name: value} for i, value in enumerate(values)
    }


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("loss", [0.1, 3.0, 2.0, 2.5], 20),  # that of step 0 does not count
        ("exact", [0.9, 0.1, 0.5, 0.2], 20),
        ("exact", [0.0, 0.5, 0.5, 0.2], 10),  # of equal ones the first
        ("kl", [0.0, 0.3, 0.1, 0.2], 20),
        ("general loss", [0.0, 0.3, 0.1, 0.2], 20),
        ("loss of wiki", [0.0, 0.3, 0.1, 0.2], 20),
        ("accuracy of loss", [0.0, 0.3, 0.1, 0.2], 10),
        ("loss", [1.0, math.nan, 2.0, math.inf], 20),
        ("exact", [1.0, None, 0.0, None], 20),
        ("exact", [1.0], None),
        ("exact", [1.0, None], None),
    ],
)
def test_the_best_step(name: str, values: list[float | None], expected: int | None) -> None:
    assert best_step(evaluations(name, values), name) == expected


@pytest.mark.parametrize(
    ("values", "min_delta", "expected"),
    [
        ([], 0.0, 0),
        ([9.0, 5.0], 0.0, 0),  # the first is a gain
        ([1.0, 5.0, 4.0, 3.0], 0.0, 0),
        ([1.0, 5.0, 4.0, 4.0, 4.5], 0.0, 2),  # an equal number is no gain
        ([1.0, 5.0, 4.0, 4.5, 3.9], 0.0, 0),
        ([1.0, 5.0, 4.9, 4.8, 4.7], 0.25, 0),  # small gains add up
        ([1.0, 5.0, 4.9, 4.8], 0.25, 2),
        ([1.0, 5.0, None, 6.0, None], 0.0, 1),  # without the number, it does not count
    ],
)
def test_evaluations_without_gain(
    values: list[float | None], min_delta: float, expected: int
) -> None:
    assert without_gain(evaluations("loss", values), "loss", min_delta) == expected


def test_what_is_to_be_low() -> None:
    low = ["loss", "perplexity", "kl", "general loss", "loss of a file.jsonl"]
    high = ["exact", "ended", "accuracy", "accuracy of loss", "bleu", "lossless"]
    assert all(map(lower_is_better, low))
    assert not any(map(lower_is_better, high))
