"""What the report and the trackers cost a run: the same run with them and without, side by side.

    python bench/overhead.py ../shared/data/models/stories260K ../shared/data/gsm8k/train.jsonl
    python bench/overhead.py MODEL ROWS --steps 2000 --every 200 --track tensorboard --rounds 3

Every run is a process of its own, timed from the settings to the model in its folder: CPU seconds of
all its threads, and seconds by the clock. Runs with and without take turns within a round, the first
of them by turns too; figures are medians over the rounds. On a busy machine CPU seconds are the fairer
ones. The last line is the ratio of the CPU seconds, with over without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("with", "without")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100, help="steps between two evaluations")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--track", nargs="*", default=["tensorboard"])
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        measure(args, is_on=args.job == "with")
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES if number % 2 else reversed(SIDES):
            found[side].append(_in_a_process(side))
            print(f"round {number + 1}  {side:8}", *_told(found[side][-1]), flush=True)
    medians = {side: _medians(found[side]) for side in SIDES}
    for side in SIDES:
        print(f"median   {side:8}", *_told(medians[side]))
    ratios = {name: medians["with"][name] / medians["without"][name] for name in ("wall", "cpu")}
    print(f"overhead wall={ratios['wall']:.4f} cpu={ratios['cpu']:.4f}")


def _in_a_process(side: str) -> dict[str, float]:
    """The figures of one run."""
    command = [sys.executable, __file__, *sys.argv[1:], "--job", side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().split("\n")[-1])


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _told(figures: dict[str, float]) -> list[str]:
    return [f"{name} {value:8.2f} s" for name, value in figures.items()]


def measure(args: argparse.Namespace, is_on: bool) -> None:
    """One run in this process; prints its figures as JSON."""
    import sftx

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
            "eval": {"every": args.every},
            "runtime": {"threads": 1, "progress": False, "device": "cpu", "report": is_on},
            "track": args.track if is_on else [],
            "output": f"{scratch}/run",
        }
        cpu, wall = time.process_time(), time.perf_counter()
        sftx.train(**settings)
        figures = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        assert Path(scratch, "run", "report.html").exists() == is_on
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
