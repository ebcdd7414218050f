"""`python -m scorecard [only=1,5,7] [json=FILE]` prints the table, and `scorecard N/N` last."""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

from scorecard.frame import checks, run_apart, run_here


def main(arguments: list[str]) -> int:
    """Run the checks that were asked for; 0 when all of them pass."""
    asked = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    if strange := asked.keys() - {"only", "json", "here"}:
        print(
            f"unknown: {', '.join(sorted(strange))}; known: only=1,5,7 json=FILE", file=sys.stderr
        )
        return 2
    known = checks()
    if "here" in asked:
        run_here(known[int(asked["here"])])
        return 0
    chosen = (
        [known[int(number)] for number in asked["only"].split(",")]
        if "only" in asked
        else list(known.values())
    )
    outcomes = []
    for one in chosen:
        outcome = run_apart(one)
        outcomes.append(outcome)
        mark = "pass" if outcome.passed else "FAIL"
        print(
            f"{one.number:2}  {mark}  {outcome.seconds:5.0f} s  {one.name:48.48}  {outcome.found}",
            flush=True,
        )
    passed = sum(outcome.passed for outcome in outcomes)
    seconds, cpu = sum(o.seconds for o in outcomes), sum(o.cpu_seconds for o in outcomes)
    print(f"\n{seconds / 60:.1f} minutes, {cpu / 60:.1f} CPU-minutes")
    if "json" in asked:
        facts = {
            "passed": passed,
            "of": len(chosen),
            "when": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
        }
        text = json.dumps({**facts, "checks": [asdict(outcome) for outcome in outcomes]}, indent=1)
        Path(asked["json"]).write_text(text + "\n", encoding="utf-8")
    print(f"scorecard {passed}/{len(chosen)}")
    return int(passed < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
