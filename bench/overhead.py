"""What the report, the trackers and the live lines cost a run, in CPU time of all its threads.

    python bench/overhead.py ../shared/data/models/stories260K ../shared/data/gsm8k/train.jsonl
    python bench/overhead.py MODEL ROWS --steps 2000 --every 200 --track tensorboard --rounds 3

Two ways, side by side. *Counted*: a run with everything on adds up the CPU seconds spent inside what
watches it: the main thread's inside each function, and all of the threads that trackers and the live
lines have. The table shows each beside the CPU seconds of the whole run; noise of the machine touches
both alike. *Compared*: the same run with everything on and off, each a process of its own, in turns;
the figures are medians over the rounds. On a busy machine the second is too coarse for one per cent.

What is on or off: report.html, the trackers, and the live lines, drawn on a terminal (a
pseudo-terminal). The records and the samples are the run's own and written either way; they are counted
too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

SIDES = ("with", "without")
EXTRAS = ("report", "trackers", "live lines")
"""What the run without them has not; the rest that is counted is written either way."""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100, help="steps between two evaluations")
    parser.add_argument("--prompts", type=int, default=8, help="answered at each evaluation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--track", nargs="*", default=["tensorboard"])
    parser.add_argument("--counted", action="store_true", help="count alone, compare nothing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        measure(args, is_on=args.job == "with")
        return
    sides = SIDES[:1] if args.counted else SIDES
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides if number % 2 else reversed(sides):
            found[side].append(_in_a_process(side))
            print(f"round {number + 1}  {side:8}", *_told(found[side][-1]), flush=True)
    medians = {side: _medians(found[side]) for side in sides}
    for side in sides:
        print(f"median   {side:8}", *_told(medians[side]))
    counted = medians["with"]
    extra = sum(counted[name] for name in EXTRAS)
    share = extra / (counted["cpu"] - extra)
    print(f"overhead counted {100 * share:.2f} %")
    if not args.counted:
        compared = medians["with"]["cpu"] / medians["without"]["cpu"] - 1
        print(f"overhead compared {100 * compared:.2f} %")


def _in_a_process(side: str) -> dict[str, float]:
    """The figures of one run, whose live lines go to a pseudo-terminal."""
    ours, theirs = os.openpty()
    drain = threading.Thread(target=_drain, args=(ours,), daemon=True)
    drain.start()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        command = [sys.executable, __file__, *sys.argv[1:], "--job", side, "--to", str(file)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment
        )
        os.close(theirs)
        if done.returncode:
            sys.exit(f"the run {side} failed; run it alone: {' '.join(command)}")
        return json.loads(file.read_text(encoding="utf-8"))


def _drain(descriptor: int) -> None:
    """Read a terminal, so that what writes there does not wait."""
    while True:
        try:
            os.read(descriptor, 1 << 16)
        except OSError:  # the other end is closed
            return


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _told(figures: dict[str, float]) -> list[str]:
    return [f" {name} {value:.3f} s" for name, value in figures.items()]


def measure(args: argparse.Namespace, is_on: bool) -> None:
    """One run in this process; writes its figures as JSON."""
    import sftx

    costs = count_costs()
    with tempfile.TemporaryDirectory() as scratch:
        settings: dict[str, Any] = {
            "model": args.model,
            "data": {
                "train": args.rows,
                "template": "none",
                "max_length": 512,
                "too_long": "drop",
                "eval_split": 0.01,
                "cache": f"{scratch}/cache",
            },
            "batch": {"examples_per_step": 8, "steps": args.steps},
            "eval": {"every": args.every, "prompts": args.prompts, "new_tokens": 32},
            "runtime": {"threads": 1, "progress": is_on, "device": "cpu", "report": is_on},
            "track": args.track if is_on else [],
            "output": f"{scratch}/run",
        }
        cpu, wall = time.process_time(), time.perf_counter()
        sftx.train(**settings)
        figures = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        assert Path(scratch, "run", "report.html").exists() == is_on
    for thread in threading.enumerate():
        if thread.name == "progress":
            thread.join()
    named = (*EXTRAS, "records", "samples")
    Path(args.to).write_text(json.dumps(figures | {name: costs[name] for name in named}))


def count_costs() -> defaultdict[str, float]:
    """CPU seconds by what they are spent on, from here on."""
    from sftx.report.live import LiveReport
    from sftx.report.progress import Progress
    from sftx.report.record import Run

    costs: defaultdict[str, float] = defaultdict(float)
    inside = threading.local()  # the outermost of two that are counted counts

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            if getattr(inside, "name", ""):
                return function(*given, **named)
            inside.name = name
            begin = time.thread_time()
            try:
                return function(*given, **named)
            finally:
                costs[name] += time.thread_time() - begin
                inside.name = ""

        return call

    places: list[tuple[type, str, str]] = [
        (LiveReport, "after", "report"),
        (LiveReport, "write", "report"),
        (Run, "write", "records"),
        (Run, "write_evaluation", "records"),
        (Run, "write_samples", "samples"),
        *((Progress, name, "live lines") for name in ("step", "evaluated", "samples", "say")),
    ]
    for owner, method, name in places:
        setattr(owner, method, counted(name, getattr(owner, method)))
    start = threading.Thread.start

    def start_known(thread: threading.Thread) -> None:
        is_tracker = thread.name.startswith("track ") or getattr(inside, "name", "") == "trackers"
        name = "trackers" if is_tracker else "live lines" if thread.name == "progress" else ""
        thread.run = counted(name, thread.run) if name else thread.run
        start(thread)

    threading.Thread.start = start_known  # pyright: ignore[reportAttributeAccessIssue]
    return costs


if __name__ == "__main__":
    main()
