"""Checks 15 to 18: two gloo processes, and what becomes of the job when one of them is told to
stop, dies or hangs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scorecard.frame import MARK, check, expect
from scorecard.runs import checkpoints, expect_equal, records, run_ranks, settings, torchrun

TRIALS = 10


def ranks_alive() -> dict[int, int]:
    """{rank: process id} of the ranks that this check has started."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (item.partition(b"=") for item in (entry / "environ").read_bytes().split(b"\0"))
            environ = {key: value for key, _, value in pairs}
            ended = "\nState:\tZ" in (entry / "status").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if (
            environ.get(MARK.encode()) == os.environ.get(MARK, "").encode()
            and b"RANK" in environ
            and not ended
        ):
            found[int(environ[b"RANK"])] = int(entry.name)
    return found


def gone_after(seconds: float) -> float:
    """How long it took until no rank was alive; `Failed` after `seconds`."""
    began = time.monotonic()
    while ranks_alive():
        expect(
            time.monotonic() - began < seconds,
            f"ranks {sorted(ranks_alive())} are alive after {seconds:g} s",
        )
        time.sleep(0.05)
    return time.monotonic() - began


def until_step(process: subprocess.Popen[str], config: dict[str, Any], step: int) -> None:
    """Wait until a step is recorded; `Failed` when the job ends before."""
    until = time.monotonic() + 120
    while not any(line["step"] >= step for line in records(config)):
        ended = process.poll() is not None
        expect(
            not ended and time.monotonic() < until,
            f"step {step} was not reached{', the job has ended' * ended}",
        )
        time.sleep(0.05)


def long_run(folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    """More steps than any check waits for."""
    return settings(
        folder, output, dropout=0.0, batch={"steps": 100}, checkpoint={"every": 0}, **changes
    )


@check(15, "SIGTERM with 2 ranks", limit=900)
def stopped(folder: Path) -> str:
    """To the launcher and to one rank: both save the same step, one whole checkpoint is left, all
    are gone in 15 s.
    """
    slowest = 0.0
    for trial in range(2 * TRIALS):
        config = long_run(folder, f"run-{trial}")
        process = torchrun(config, fault="slow")
        until_step(process, config, 2)
        target = process.pid if trial % 2 else ranks_alive()[trial // 2 % 2]
        os.kill(target, signal.SIGTERM)
        slowest = max(slowest, gone_after(15))
        process.wait(15)
        expect(len(checkpoints(config)) == 1, f"trial {trial}: checkpoints {checkpoints(config)}")
        step = int(checkpoints(config)[0].removeprefix("step-"))
        expect(
            len(records(config)) == step,
            f"trial {trial}: saved step {step}, recorded {len(records(config))}",
        )
    whole, config = long_run(folder, "whole"), long_run(folder, "run-0")
    run_ranks(whole)
    run_ranks(config)
    expect_equal(whole, config)
    return (
        f"{2 * TRIALS} of {2 * TRIALS}: one whole checkpoint, gone within {slowest:.1f} s; "
        "continued to the bit"
    )


def _fault(
    folder: Path,
    fault: str,
    act: Callable[[int], Any] = lambda launcher: None,
    output: str = "run",
    **changes: Any,
) -> tuple[str, float]:
    """What a faulty run printed, and the seconds from its last step until no rank was left."""
    config = long_run(folder, output, **changes)
    process = torchrun(config, fault=fault)
    until_step(process, config, 3)
    act(process.pid)
    seconds = gone_after(60)
    expect(process.wait(15) != 0, "the launcher reports success")
    return Path(config["output"]).with_suffix(".log").read_text(errors="replace"), seconds


@check(16, "Dead rank", limit=240)
def dead(folder: Path) -> str:
    """A rank that is killed or fails ends the job within 10 s; the message names the rank and its
    last step.

    So does one that diverges: it has other settings, or its weights are no longer those of the
    others.
    """
    slowest = 0.0
    for fault in ("die:1:5", "raise:1:5", "leave:1:5"):
        text, seconds = _fault(folder, fault, output=fault[:4])
        slowest = max(slowest, seconds)
        expect(seconds <= 10, f"{fault}: the other rank lived for {seconds:.1f} s")
        expect("rank 1 was last heard of at step" in text, f"{fault}: {text[-300:]}")
    diverging = {
        "drift:1:4": "the weights of rank 1 are no longer those",
        "other:1:1": "rank 1 has other settings",
    }
    for fault, expected in diverging.items():
        config = settings(folder, fault[:5], dropout=0.0)
        text = run_ranks(config, fault=fault, code=1)
        expect(expected in text, f"{fault}: {text[-300:]}")
        expect(
            checkpoints(config) in ([], ["step-00000003"]), f"{fault}: saved {checkpoints(config)}"
        )
    return (
        f"gone after {slowest:.1f} s, rank 1 and its last step named; ranks that diverge are "
        "refused by name"
    )


@check(17, "Hung rank", limit=180)
def hung(folder: Path) -> str:
    """A rank that hangs ends the job within the time set + 10 s; it is named and every rank shows
    its stacks.
    """
    text, seconds = _fault(folder, "hang:1:5", runtime={"rank_timeout": 15})
    expect(seconds <= 25, f"gone only after {seconds:.1f} s")
    expect("rank 1 was last heard of at step" in text, text[-300:])
    hangs = text.partition("Timeout (")[2].partition("Timeout (")[0]
    expect(
        "most recent call first" in hangs and "in <lambda>" in hangs,
        "the stacks of rank 1 were not shown",
    )
    expect(
        re.search(r"\[rank0\]: Traceback|Traceback \(most recent call last", text),
        "the stack of rank 0 was not shown",
    )
    return f"gone after {seconds:.1f} s at a limit of 15 s, rank 1 named, stacks of both shown"


@check(18, "No orphans", limit=150)
def orphans(folder: Path) -> str:
    """When the launcher is killed, no rank is alive 10 s later."""
    _, seconds = _fault(folder, "slow", lambda launcher: os.kill(launcher, signal.SIGKILL))
    expect(seconds <= 10, f"ranks lived for {seconds:.1f} s")
    return f"no rank alive {seconds:.1f} s after the launcher was killed"
