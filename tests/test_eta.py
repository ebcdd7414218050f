"""Predicted time is that of a free machine; the steps themselves correct it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sftx.data.plan import Plan
from sftx.report.progress import Progress, duration
from sftx.settings.schema import Batch
from sftx.training.metrics import Eta
from sftx.types import StepRecord


def plan(lengths: list[int], **batch: Any) -> Plan:
    return Plan(
        np.array(lengths, np.int32),
        np.ones(len(lengths)),
        Batch(examples_per_step=2, **batch),
        seed=0,
    )


def test_what_is_left_goes_by_work_and_not_by_steps() -> None:
    """Steps that take a second for every token, very short ones and very long ones."""
    made = plan(np.random.RandomState(0).lognormal(4, 1.2, 300).astype(int).tolist(), epochs=3)
    tokens = [int(made.lengths[made.examples(step)].sum()) for step in range(made.num_steps)]
    eta = Eta(made)
    for step, took in enumerate(tokens):
        left = eta.after(step, float(took) if step else 1e6)  # the first one warms up
        if step == 0:
            assert left is None
        else:
            assert left == pytest.approx(sum(tokens[step + 1 :]), rel=0.1, abs=0.05 * sum(tokens))


def test_a_machine_that_gets_busy_is_noticed() -> None:
    made = plan([10] * 400)
    eta = Eta(made)
    calm = [eta.after(step, 1.0) for step in range(100)][-1]
    busy = [eta.after(step, 4.0) for step in range(100, 160)][-1]
    assert calm == pytest.approx(100)
    assert busy == pytest.approx(40 * 4, rel=0.1)


def test_a_run_that_is_continued_counts_its_own_steps_only() -> None:
    made = plan([10] * 40)
    eta = Eta(made)
    assert eta.after(15, 9.0) is None
    assert eta.after(16, 2.0) == pytest.approx(6.0)
    assert [eta.after(step, 2.0) for step in (17, 18, 19)] == pytest.approx([4.0, 2.0, 0.0])


def record(step: int, left: float | None) -> StepRecord:
    made = StepRecord(0, 10)
    made.step, made.loss, made.seconds_left = step, 1.0, left
    return made


@pytest.mark.parametrize(
    ("left", "said"), [(140.0, "2.0 times the prediction"), (70.0, ""), (9.0, "")]
)
def test_the_prediction_is_corrected_where_it_was_far_off(left: float, said: str) -> None:
    progress = Progress(on=True)
    progress.console = Console(file=(shown := io.StringIO()), width=200)
    progress.time(100.0)
    for step in (1, 2, 3, 4, 10):
        progress.step(record(step, None if step == 1 else 0.0 if step == 10 else left))
    text = shown.getvalue()
    assert "about 100 s for all steps, while nothing else runs on this machine" in text
    assert ("times the prediction" in text) == bool(said)
    assert said in text
    assert "nothing" not in text.splitlines()[-1]


def testdurations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (3.4, 119, 721, 7199, 12_000)] == [
        "3 s",
        "119 s",
        "12 min",
        "2 h 0 min",
        "3 h 20 min",
    ]
