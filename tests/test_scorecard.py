"""The quick checks of the reliability scorecard, and that the scorecard can tell a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scorecard import frame, fuzz

CHECKS = frame.checks()
SLOW = (1, 6, 19)  # several runs each
QUICK = [number for number, one in CHECKS.items() if one.quick and number not in SLOW]


@pytest.mark.parametrize(
    "number",
    [*QUICK, *(pytest.param(number, marks=pytest.mark.slow) for number in SLOW)],
    ids=lambda number: CHECKS[number].name,
)
def test_check(number: int, tmp_path: Path) -> None:
    assert CHECKS[number].run(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "number",
    [8, 10, 12, 13, 14, 20, 26, 28, 29, 30, 31, 32, 33, 34, 35],
    ids=lambda n: CHECKS[n].name,
)
def test_check_of_its_own_process(number: int) -> None:
    outcome = frame.run_apart(CHECKS[number])
    assert outcome.passed, outcome.found


@pytest.mark.slow
def test_broken_rows_files_and_templates(tmp_path: Path) -> None:
    assert fuzz.rows(tmp_path, 100) >= 100
    assert fuzz.files(tmp_path, 200) + fuzz.templates(tmp_path, 150) == 350


def test_a_failing_check_is_a_failing_line(tmp_path: Path) -> None:
    script = (
        "import sys; from scorecard import frame, __main__ as program\n"
        "@frame.check(1, 'holds', 9)\ndef one(folder): return 'measured'\n"
        "@frame.check(2, 'does not', 9)\ndef two(folder): frame.expect(1 > 2, 'found 1')\n"
        "@frame.check(3, 'hangs', 1)\ndef three(folder): __import__('time').sleep(60)\n"
        "frame.GROUPS, frame.PROGRAM = (), [sys.executable, "
        "__file__]\nsys.exit(program.main(sys.argv[1:]))\n"
    )
    (tmp_path / "small.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "small.py", "json=out.json"],
        cwd=tmp_path,
        env=frame.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "scorecard 1/3"
    outcomes = json.loads((tmp_path / "out.json").read_text())["checks"]
    assert [one["passed"] for one in outcomes] == [True, False, False]
    assert [one["found"] for one in outcomes] == ["measured", "found 1", "not done after 1 s"]


@pytest.mark.long
def test_without_hypothesis_only_the_check_that_needs_it_fails_and_says_so(tmp_path: Path) -> None:
    script = (
        "import sys, importlib.util\nfind = importlib.util.find_spec\n"
        "sys.modules['hypothesis'] = None\n"  # importing it is an ImportError
        "importlib.util.find_spec = lambda name, *rest: None if name == 'hypothesis' else "
        "find(name, *rest)\n"
        "from pathlib import Path\nfrom scorecard import frame, inputs\n"
        "inputs.MALFORMED = inputs.MALFORMED[:1]\n"
        "inputs.run = lambda *_, **__: '4.jsonl:4: '\n"
        "print(len(frame.checks()))\n"
        "try:\n    inputs.malformed(Path(sys.argv[1]))\nexcept frame.Failed as failed:\n    "
        "print(failed)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=frame.environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    count, said = done.stdout.splitlines()
    assert int(count) == len(CHECKS)
    assert "hypothesis is not installed (pip install 'sftx[dev]')" in said
