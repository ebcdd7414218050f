"""What a check is, and how it is run: in a fresh process, with a time limit, and nothing left
running after it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

GROUPS = (
    "numbers",
    "resume",
    "faults",
    "ranks",
    "load",
    "inputs",
    "security",
    "folders",
    "lengths",
)
TESTS = Path(__file__).resolve().parent.parent
PROGRAM = (sys.executable, "-m", "scorecard")
MARK = "SFTX_SCORECARD"  # in the environment of a check and of all that it starts


class Failed(AssertionError):
    """Something that must hold does not; the message says what was found."""


def expect(holds: object, found: str) -> None:
    """Raise `Failed(found)` unless `holds`."""
    if not holds:
        raise Failed(found)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the scorecard. `run` takes an empty folder and returns what it measured, in a few
    words.
    """

    number: int
    name: str
    run: Callable[[Path], str]
    limit: int  # seconds of wall time
    quick: bool  # also an ordinary test


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a check. `cpu_seconds` include all processes that it waited for."""

    number: int
    name: str
    passed: bool
    found: str
    seconds: float
    cpu_seconds: float


_checks: dict[int, Check] = {}


def check(
    number: int, name: str, limit: int, quick: bool = False
) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    """Enter a function into the scorecard."""

    def enter(run: Callable[[Path], str]) -> Callable[[Path], str]:
        assert number not in _checks
        _checks[number] = Check(number, name, run, limit, quick)
        return run

    return enter


def checks() -> dict[int, Check]:
    """All checks by their number."""
    for group in GROUPS:
        import_module(f"scorecard.{group}")
    return dict(sorted(_checks.items()))


def run_here(one: Check) -> None:
    """Run a check in this process and print its outcome as the last line, as JSON."""
    with tempfile.TemporaryDirectory(prefix="sftx-scorecard-") as folder:
        try:
            passed, found = True, one.run(Path(folder))
        except Failed as failure:
            passed, found = False, str(failure)
        except (
            BaseException
        ) as error:  # whatever it is, it is the outcome; the details go to stderr
            traceback.print_exc()
            passed, found = False, f"{type(error).__name__}: {error}"
    print("\n" + json.dumps({"passed": passed, "found": " ".join(found.split())[:600]}), flush=True)


def environment(**more: str) -> dict[str, str]:
    """The variables of a process that imports this package: those of this one, and `more`."""
    paths = [str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        **more,
    }


def run_apart(one: Check) -> Outcome:
    """Run a check in a process of its own; kill it and its children when its time is over."""
    mark = f"{os.getpid()}.{one.number}.{time.monotonic_ns()}"
    began, before = time.monotonic(), used()
    process = subprocess.Popen(
        [*PROGRAM, f"here={one.number}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=environment(
            **{
                MARK: mark,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
            }
        ),
    )
    try:
        text, _ = process.communicate(timeout=one.limit)
        last = text.strip().rpartition("\n")[2]
        told = json.loads(last) if last.startswith("{") else {}
        answer = told or {
            "passed": False,
            "found": f"ended with code {process.returncode}: {text.strip()[-300:]}",
        }
        if not answer["passed"]:
            print(text[-3000:], file=sys.stderr)
    except subprocess.TimeoutExpired:
        answer = {"passed": False, "found": f"not done after {one.limit} s"}
        process.kill()
    process.wait()
    if left := sweep(mark):
        answer = {
            "passed": False,
            "found": f"{answer['found']}; {left} processes were left running",
        }
    return Outcome(
        one.number,
        one.name,
        **answer,
        seconds=time.monotonic() - began,
        cpu_seconds=used() - before,
    )


def sweep(mark: str) -> int:
    """Kill what a check started and left running; returns how many there were."""
    left = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if mine and "\nState:\tZ" not in (entry / "status").read_text():
                os.kill(int(entry.name), signal.SIGKILL)
                left += 1
        except (OSError, ValueError):  # it has just ended, or is not ours to read
            continue
    return left


def used() -> float:
    """CPU-seconds of all children of this process that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
