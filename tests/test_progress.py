"""What is shown while a command runs: at once, on a terminal of any width, and in a file."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from sftx.report import progress as module
from sftx.report.progress import Phase, Progress, working
from sftx.types import StepRecord

pty = pytest.importorskip("pty")


def on_a_terminal(command: list[str], columns: int, cwd: Path, **more: str) -> tuple[str, int]:
    """What `command` writes to a terminal, and its exit code."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    hidden = ("COLUMNS", "LINES", "NO_COLOR", "JPY_PARENT_PID")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd,
        env={**environment, "TERM": "xterm-256color", **more},
    )  # fmt: skip
    os.close(theirs)
    text = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        text += read
    os.close(ours)
    return text.decode(errors="replace"), process.wait()


def lines_of(text: str) -> list[str]:
    """The lines without what a terminal obeys."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line for part in plain.split("\n") for line in part.split("\r") if line]


def test_the_first_line_comes_before_any_import(tmp_path: Path) -> None:
    """Before those that take time; Python tells of each on the same terminal."""
    words = ["train", "model=a", "data=x", "output=o", "seed=z"]
    command = [sys.executable, "-X", "importtime", "-m", "sftx", *words]
    text, code = on_a_terminal(command, 80, tmp_path)
    assert code == 2
    before, shown, after = text.partition("start    sftx train model=a")
    assert shown
    for package in ("pydantic", "yaml"):
        line = re.compile(rf"\| +{package}\b")
        assert not line.search(before)
        assert line.search(after)


def test_a_first_line_that_the_settings_forbid_does_not_come(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("runtime: {progress: false}\n")
    for more in (["run.yaml"], ["runtime.progress=false"], ["--help"]):
        command = [sys.executable, "-m", "sftx", "train", *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "start    sftx" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_longer_than_the_terminal(tmp_path: Path, columns: int) -> None:
    tiny.folder(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "[red]one[/] line and one more"}\n' * 200)
    command = [
        sys.executable, "-m", "sftx", "train", "model=model", "data=rows.jsonl", "output=out",
        "data.eval_split=0.5", "data.cache=cache", "runtime.device=cpu", "batch.steps=60",
        "batch.shuffle=false",
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"text": "[red]one[/] line and {i} more"}}\n' for i in range(200))
    )
    text, code = on_a_terminal(command, columns, tmp_path)
    assert code == 0, text
    shown = lines_of(text)
    assert max(map(len, shown)) <= columns
    assert not re.search(r"\n\s*\n\s*\n", "\n".join(shown))
    whole = " ".join(" ".join(shown).split())
    for word in ("train", "plan", "model", "loss", "lr", "grad", "tok/s", "targets/s", "GiB"):
        assert word in whole
    assert re.search(r"step +60/60", whole)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is there again


SAYS_SOMETHING = (
    "import time\nfrom sftx.report.progress import Progress\nfrom sftx.report import progress\n"
    "progress.LONG = progress.REFRESH = 0.05\n"
    "with Progress(on=True) as shown:\n"
    "    shown.phase('a job')\n    time.sleep(0.8)\n    shown.say('done')\n"
)


@pytest.mark.slow
def test_nothing_is_drawn_anew_in_the_output_of_a_notebook(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAYS_SOMETHING]
    notebook = {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"}
    environment = {**os.environ, **notebook, "TERM": "xterm-color"}
    piped = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    as_terminal, _ = on_a_terminal(command, 80, tmp_path, **notebook, JPY_PARENT_PID="1")
    for said in (piped.stderr, as_terminal):
        assert "a job" in said
        assert "\x1b[" not in said
    redrawn, _ = on_a_terminal(command, 80, tmp_path)
    assert "\x1b[" in redrawn


def plain(shown: io.StringIO) -> Progress:
    progress = Progress(on=True)
    progress.console = Console(file=shown, width=80)
    return progress


def test_a_job_that_takes_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [1000.0], [0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "REFRESH", 0.005)
    progress = plain(shown := io.StringIO())
    name_long_phase = progress._name_long_phase

    def look() -> None:
        name_long_phase()
        looks[0] += 1

    monkeypatch.setattr(progress, "_name_long_phase", look)

    def later(seconds: float) -> None:
        """Let the time pass, and the thread look at it."""
        now[0] += seconds
        enough = looks[0] + 2
        end = time.perf_counter() + 60
        while looks[0] < enough:
            assert time.perf_counter() < end
            time.sleep(0.005)

    with progress:
        progress.phase("a short job")
        later(1.9)
        progress.phase("a long job")
        for seconds in (1.9, 0.1, 9.9, 0.1):
            later(seconds)
        progress.phase("evaluating|packs", 0, 8)
        later(1)
        progress.phase("evaluating|packs", 2, 8)
        later(3)
    assert shown.getvalue().splitlines() == [
        "a long job, 2 s so far",
        "a long job, 12 s so far",
        "evaluating 2 of 8 packs, about 12 s left",
    ]
    with working("nothing", on=False) as silent:
        assert silent.console.quiet


def test_what_is_left_is_told_from_what_is_done() -> None:
    phase = Phase("encoding|rows", time.monotonic() - 10, 2_000, 6_000)
    assert phase.text() == "encoding 2,000 of 6,000 rows, about 20 s left"
    assert Phase("encoding|rows", time.monotonic(), 0, 5).text() == "encoding, 0 s so far"


def record(step: int) -> StepRecord:
    made = StepRecord(0, 100)
    made.step, made.loss, made.grad_norm, made.learning_rate = step, 1.25, 0.5, 2e-5
    made.seconds, made.tokens, made.targets, made.tokens_per_second = 2.0, 200, 80, 100.0
    made.memory, made.seconds_left = 2**30, 90.0
    return made


def test_a_step_tells_all_its_numbers_at_a_sane_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    progress = plain(shown := io.StringIO())
    progress.model("a model", [], 0, limit=4 * 2**30)
    progress.evaluated(0, {"loss": 1.5, "perplexity": 4.48, "targets": 3.0})
    for step in range(1, 101):
        now[0] += 1
        progress.step(record(step))
    steps = [line for line in shown.getvalue().splitlines() if line.startswith("step ")]
    assert steps[0] == (
        "step     1/100  loss 1.2500  held out 1.5000  lr 2.00e-05  grad 0.50  100 tok/s  "
        "40 targets/s  1.0 of 4.0 GiB  90 s left"
    )
    assert len(steps) == 11  # the first, every ten seconds, the last
    now[0] += 3600  # after an hour, one each minute is enough
    progress = plain(shown := io.StringIO())
    progress._began = now[0] - 3600
    for step in range(2, 99):
        now[0] += 10
        progress.step(record(step))
    assert len(shown.getvalue().splitlines()) == 97 * 10 // 60


def test_answers_are_shown_as_text() -> None:
    progress = plain(shown := io.StringIO())
    answer = {"step": 4, "prompt": "[bold]\x1b[2J\n?", "output": "o" * 900, "reference": "r"}
    progress.samples([answer, answer])
    said = shown.getvalue().splitlines()
    assert said[0] == "prompt   [bold]\\x1b[2J ?"
    assert said[1] == f"answer   {'o' * 157}..."
    assert len(said) == 3


def test_lines_are_folded_by_the_width_of_their_signs() -> None:
    console = Console(file=io.StringIO(), width=40, force_terminal=True)
    folded = module._folded(f"warning  {'漢字 ' * 20}end", console).splitlines()
    assert len(folded) > 2
    assert all(console.measure(line).maximum <= 40 for line in folded)
    assert all(line.startswith(" " * 9) for line in folded[1:])
