"""Mutation testing by hand: break one line of the code at a time, and see whether the tests notice.

    python tests/mutants.py                      every mutant against the tests named beside it
    python tests/mutants.py only=plan,loss       those whose names contain one of these words
    python tests/mutants.py survivors=suite      what survives also meets the whole default suite

The mutants are listed in `mutant_list.py`. Each is tried on a copy of `src`, so the code itself is
never touched. The last line is `mutants KILLED/TRIED`; the exit code is 0 when every survivor has
its reason in the list.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 400
"""Seconds for the tests of one mutant. A mutant that makes them hang is killed, in both senses."""
SLOW_IMPORTS = (
    "torch",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.checkpoint.state_dict_loader",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.attention.varlen",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "hypothesis",
    "pydantic",
    "pytest",
    "rich",
)
"""What sftx imports and no mutant changes: imported once here, so that a forked process begins with
it.
"""


def copy_of_source(folder: Path) -> Path:
    """A copy of `src` in `folder`."""
    source = folder / "src"
    shutil.copytree(
        ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    return source


def put_into(source: Path, mutant: Mutant) -> None:
    """Put the mutant into a copy of `src`; `ValueError` if its text is not there exactly once."""
    path = source / "sftx" / mutant.file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} holds its text {text.count(mutant.old)} times")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def in_a_fork(work: Callable[[], int], log: Path) -> int:
    """Exit code of `work` in a process of its own, with all it started ended after it; 124 = it
    took too long.
    """
    process = os.fork()
    if process == 0:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 70
        try:
            code = int(work())
        finally:
            sys.stdout.flush()
            os._exit(code)
    end = time.monotonic() + LIMIT
    ended, status = 0, 0
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if not ended:
        os.waitpid(process, 0)
        return 124
    return os.waitstatus_to_exitcode(status)


def run_pytest(source: Path, arguments: list[str]) -> int:
    """pytest in this process, on the code in `source`."""
    use(source)
    import pytest

    os.chdir(ROOT)
    named = [f"tests/{word}" if word.startswith("test_") else word for word in arguments]
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *named]))


def run_scorecard(source: Path, numbers: str) -> int:
    """The named checks of the scorecard, on the code in `source`; 0 = all pass."""
    use(source)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(source), str(ROOT / "tests")])
    program = [sys.executable, "-m", "scorecard", f"only={numbers}"]
    return os.spawnv(os.P_WAIT, sys.executable, program)


def use(source: Path) -> None:
    """Let this process and those it starts import sftx from `source`."""
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = str(source)
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(source.parent / "hypothesis")


def killer(mutant: Mutant, whole_suite: bool) -> str:
    """What notices the mutant: the first failing test, or `""` where it survives.

    `ValueError` if the mutant or a test is not there, or if the test fails without any mutant too.
    """
    with tempfile.TemporaryDirectory(prefix="sftx-mutant-") as name:
        folder = Path(name)
        source = copy_of_source(folder)
        put_into(source, mutant)
        for tests in (*mutant.tests, *["the default suite"] * whole_suite):
            if found := try_on(source, tests, folder / "log"):
                if said := failure_without_mutant(tests):
                    raise ValueError(f"without it, too: {said}")
                return found
    return ""


@cache
def failure_without_mutant(tests: str) -> str:
    """The first failure of these tests on the code as it is; `""` where they pass."""
    with tempfile.TemporaryDirectory(prefix="sftx-no-mutant-") as folder:
        return try_on(copy_of_source(Path(folder)), tests, Path(folder) / "log")


def try_on(source: Path, tests: str, log: Path) -> str:
    """The first failure of these tests on the code in `source`; `ValueError` if there are no such
    tests.
    """
    kind, _, rest = tests.partition(" ")
    if kind == "scorecard":
        code = in_a_fork(lambda: run_scorecard(source, rest), log)
    elif kind == "the":
        code = in_a_fork(lambda: run_pytest(source, []), log)
    else:
        code = in_a_fork(lambda: run_pytest(source, shlex.split(tests)), log)
        if code in (4, 5):  # pytest's codes for tests that are not there
            raise ValueError(f"no test is called {tests}")
    return first_failure(log, tests, code) if code else ""


def first_failure(log: Path, tests: str, code: int) -> str:
    """The line of a log that says what failed, in short."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    checks = [line for line in lines if "  FAIL  " in line]
    if code == 124:
        return f"{tests}: not done after {LIMIT} s"
    said = [*failed, *checks, f"exit code {code}"][0]
    late = (
        " (a time limit: look whether the machine was busy)"
        if "TimeoutExpired" in "".join(lines)
        else ""
    )
    return f"{tests}: {said}{late}"


def main(arguments: list[str]) -> int:
    """Try the mutants that were asked for, and print a line for each."""
    asked: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        asked[key] = value
    if strange := asked.keys() - {"only", "survivors"}:
        print(
            f"unknown: {', '.join(sorted(strange))}; known: only=WORD,WORD survivors=suite",
            file=sys.stderr,
        )
        return 2
    words = asked["only"].split(",") if "only" in asked else [""]
    chosen = [mutant for mutant in MUTANTS if any(word in mutant.name for word in words)]
    for module in SLOW_IMPORTS:
        importlib.import_module(module)
    killed, unexplained = 0, 0
    for mutant in chosen:
        began = time.monotonic()
        try:
            found = killer(mutant, asked.get("survivors") == "suite")
        except ValueError as error:
            print(f"no answer {mutant.name}: {error}", flush=True)
            unexplained += 1
            continue
        killed += bool(found)
        unexplained += not found and not mutant.reason
        verdict = "killed  " if found else "SURVIVES"
        why = found or mutant.reason or "no test and no reason"
        print(
            f"{verdict}  {mutant.name:32} {time.monotonic() - began:4.0f} s  {why[:150]}",
            flush=True,
        )
    print(f"mutants {killed}/{len(chosen)}")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
