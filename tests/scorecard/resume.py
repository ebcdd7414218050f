"""Checks 7 to 10: a run that was stopped anywhere continues as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from scorecard.frame import check, expect
from scorecard.runs import (
    die,
    digest,
    expect_equal,
    facts,
    on_step,
    records,
    run,
    run_ranks,
    settings,
    write_rows,
)


def killed_and_continued(whole: dict[str, Any], killed: dict[str, Any], *steps: int) -> int:
    """Kill a run when it has computed its n-th step, for every n in turn, continue it, and compare
    with the whole.
    """
    run(whole)
    for step in steps:
        run(killed, on_step(step, die), code=-9)
    run(killed)
    return expect_equal(whole, killed)


@check(7, "kill -9 mid-epoch", limit=240)
def kill(folder: Path) -> str:
    """After SIGKILL a run continues to the bit, dropout on.

    Full, packed and one by one, LoRA, encoding workers, on an epoch's border, in epoch 3, and 2
    ranks.
    """
    cases: dict[str, tuple[dict[str, Any], int]] = {
        "full": ({}, 8),
        "one example at a time": ({"runtime": {"tokens_per_pack": 1}}, 5),
        "LoRA": ({"adapter": {"method": "lora", "rank": 4, "dropout": 0.1}}, 8),
        "workers": ({"data": {"workers": 2}}, 7),
        "epoch border": ({"checkpoint": {"every": 6}}, 7),
        "epoch 3": ({"batch": {"examples_per_step": 8}}, 8),
    }
    compared = 0
    for name, (changes, step) in cases.items():
        one, two = (
            settings(folder, f"{name} whole", **changes),
            settings(folder, f"{name} killed", **changes),
        )
        compared += killed_and_continued(one, two, step)
    one, two = settings(folder, "ranks whole"), settings(folder, "ranks killed")
    run_ranks(one)
    run_ranks(two, fault="die:1:8", code=1)
    run_ranks(two)
    compared += expect_equal(one, two, "2 ranks")
    return (
        f"{compared} of {compared} steps and all final weights equal to the bit in "
        f"{len(cases) + 1} cases"
    )


@check(8, "Streaming, several passes, killed twice", limit=90)
def passes(folder: Path) -> str:
    """Data that is read through a converter, several passes, killed in the second and in the
    fourth: to the bit.
    """
    rows = folder / "rows.csv"
    quoted = [[json.dumps(row[key]) for key in ("prompt", "completion")] for row in tiny.pairs(16)]
    rows.write_text(
        "".join(",".join(values) + "\n" for values in [["prompt", "completion"], *quoted])
    )
    changes = {"data": {"train": str(rows)}, "batch": {"steps": 20}}
    one, two = settings(folder, "whole", **changes), settings(folder, "killed", **changes)
    compared = killed_and_continued(one, two, 6, 9)
    expect(records(one)[-1]["epoch"] == 5.0, f"{records(one)[-1]['epoch']} passes instead of 5")
    return f"{compared} of {compared} steps equal to the bit over 5 passes, killed twice"


@check(9, "Elastic 2 -> 1 -> 2", limit=150)
def elastic(folder: Path) -> str:
    """A run moves from 2 processes to 1 and back: the same examples in every step, losses within
    1e-6 at dropout 0.
    """
    one, two = settings(folder, "whole", dropout=0.0), settings(folder, "moved", dropout=0.0)
    run(one)
    run_ranks(two, fault="die:1:5", code=1)
    run(two, on_step(5, die), code=-9)
    run_ranks(two)
    first, second = records(one), records(two)
    expect(len(first) == len(second), f"{len(second)} steps recorded, not {len(first)}")
    same = (
        "step",
        "examples",
        "tokens",
        "targets",
        "weight",
        "learning_rate",
        "total_tokens",
        "total_targets",
    )
    odd = [
        a["step"]
        for a, b in zip(first, second, strict=True)
        if any(a[key] != b[key] for key in same)
    ]
    expect(not odd, f"steps {odd} have other examples")
    worst = max(abs(b["loss"] / a["loss"] - 1) for a, b in zip(first, second, strict=True))
    expect(worst <= 1e-6, f"losses differ by {worst:.2g}")
    return f"losses within {worst:.1e} over {len(first)} steps on 2, 1 and 2 processes"


@check(10, "Counters, config, data identity", limit=120)
def identity(folder: Path) -> str:
    """Counters continue; what was changed is refused with a diff or allowed by name; a finished run
    takes no step.
    """
    one, two = settings(folder, "whole"), settings(folder, "run")
    killed_and_continued(one, two, 8)
    last = records(two)[-1]
    expect(
        last["total_tokens"] == sum(line["tokens"] for line in records(two)),
        "total_tokens is not the sum",
    )
    before = digest(two), (folder / "run" / "metrics.jsonl").read_bytes()
    text = run(two, on_step(1, die))
    expect("no step was taken" in text, f"a finished run said {text[-200:]}")
    expect(
        before == (digest(two), (folder / "run" / "metrics.jsonl").read_bytes()),
        "a finished run was changed",
    )
    fewer = {"data": {"train": write_rows(folder / "fewer.jsonl", tiny.pairs(23))}}
    changes: dict[str, Any]
    for changes, named in (
        ({"optim": {"learning_rate": 5e-3}}, "optim.learning_rate"),
        (fewer, "data.fingerprint"),
    ):
        name = named.partition(".")[0]
        stopped = settings(folder, f"stopped {name}")
        run(stopped, on_step(8, die), code=-9)
        other = settings(folder, f"stopped {name}", **changes)
        text = run(other, code=2)
        expect(
            named in text and "resume_allow" in text,
            f"a change of {named} was refused with: {text[-300:]}",
        )
        run({**other, "checkpoint": {"every": 3, "resume_allow": [name]}})
        expect(
            facts(other)["changed"][0]["step"] == 6 and named in facts(other)["changed"][0],
            "the change is not recorded",
        )
        expect(len(records(other)) == 12, "the allowed run is not whole")
    expect(
        records(settings(folder, "stopped optim"))[-1]["learning_rate"]
        > 2 * records(one)[-1]["learning_rate"],
        "ignored",
    )
    return (
        "counters equal, 2 changes refused and 2 allowed and recorded, a finished run took 0 steps"
    )
