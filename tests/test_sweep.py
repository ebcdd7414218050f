"""Sweeps: what is tried, what is remembered, and which trial is the best."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny

from sftx.cli import main
from sftx.cli import sweep as verb
from sftx.sweep import Choice, Range, grid, pieces, random_points, run_process, values_of
from sftx.types import UserError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1e-5,3e-5", Choice(("1e-5", "3e-5"))),
        ("[a.jsonl,b.jsonl]", None),
        ("[a,b],[c]", Choice(("[a,b]", "[c]"))),
        ("{a: [1,2], b: 3},{}", Choice(("{a: [1,2], b: 3}", "{}"))),
        ("'a,b.jsonl'", None),
        ("true,false", Choice(("true", "false"))),
        ("../rows.jsonl", None),
        ("1e-5..1e-3", Range(1e-5, 1e-3, False)),
        ("8..64", Range(8, 64, True)),
        ("0..0.2", Range(0, 0.2, False)),
        ("-1..1", Range(-1, 1, True)),
    ],
)
def test_what_is_swept_over(text: str, found: Choice | Range | None) -> None:
    assert values_of("key", text) == found


def test_a_list_is_one_value() -> None:
    assert pieces("[a,[b,c]],{d: 'e,]f'},g") == ["[a,[b,c]]", "{d: 'e,]f'}", "g"]
    for wrong in ("1,", "1,1", "3..1"):
        with pytest.raises(UserError, match="key="):
            values_of("key", wrong)


def test_the_grid_is_every_combination_once() -> None:
    space = {"a": Choice(("1", "2")), "b": Choice(("x", "y"))}
    assert grid(space) == [
        {"a": "1", "b": "x"},
        {"a": "1", "b": "y"},
        {"a": "2", "b": "x"},
        {"a": "2", "b": "y"},
    ]
    with pytest.raises(UserError, match="trials=N"):
        grid({"a": Range(0, 1, False)})


def test_draws_stay_in_their_range_and_none_comes_twice() -> None:
    space = {"lr": Range(1e-5, 1e-3, False), "rank": Range(8, 64, True), "p": Choice(("0", "0.1"))}
    drawn = [point for point, _ in zip(random_points(space, 3), range(400), strict=False)]
    rates = sorted(float(point["lr"]) for point in drawn)
    assert 1e-5 <= rates[0] < 2e-5
    assert 0.7e-4 < rates[200] < 1.4e-4  # the middle of the logarithms
    assert {int(point["rank"]) for point in drawn} <= {*range(8, 65)}
    assert len({tuple(point.values()) for point in drawn}) == 400
    again = [point for point, _ in zip(random_points(space, 3), range(400), strict=False)]
    assert again == drawn
    few = list(random_points({"p": Choice(("0", "0.1"))}, 0))
    assert sorted(point["p"] for point in few) == ["0", "0.1"]


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    """A run as it is written on the command line."""
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    return [f"model={tmp_path}", f"data={tmp_path / 'rows.jsonl'}", "data.eval_split=0.5"]


Trained = Callable[[dict[str, str]], float | str]


def stand_in(monkeypatch: pytest.MonkeyPatch, trained: Trained) -> list[dict[str, str]]:
    """In place of processes that train: `trained` gives the held-out loss, or the error."""
    calls: list[dict[str, str]] = []

    def run(command: Sequence[str], log: Path, watch: Callable[[], bool]) -> int:
        given = dict(part.split("=", 1) for part in command[4:] if "=" in part)
        calls.append(given)
        watch()
        found = trained(given)
        if isinstance(found, str):
            log.write_text(f"start    sftx train\nerror: {found}\n")
            return 2
        folder = Path(json.loads(given["output"]))
        folder.mkdir()
        facts = {"status": "finished", "eval_after": {"loss": found}, "config": {}}
        (folder / "run.json").write_text(json.dumps(facts))
        return 0

    monkeypatch.setattr(verb, "run_process", run)
    return calls


def test_the_best_is_named_and_the_same_command_continues(
    rows: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    asked = ["sweep", *rows, f"output={out}", "optim.learning_rate=1e-5,1e-4", "seed=1,2"]
    killed = [True]

    def trained(given: dict[str, str]) -> float | str:
        if given["optim.learning_rate"] == "1e-4" and given["seed"] == "1":
            if killed.pop() if killed else False:
                raise KeyboardInterrupt
            return "out of memory"
        return float(given["optim.learning_rate"]) * 1e5 + float(given["seed"])

    calls = stand_in(monkeypatch, trained)
    assert main(asked) == 130
    assert [call["seed"] for call in calls] == ["1", "2", "1"]
    states = [trial["state"] for trial in json.loads((out / "sweep.json").read_text())["trials"]]
    assert states == ["finished", "finished", "running"]
    calls.clear()
    assert main(asked) == 0  # a trial that fails does not end the others
    assert [call["output"] for call in calls] == [
        json.dumps(str(out / "trial-3")),
        json.dumps(str(out / "trial-4")),
    ]
    said = capsys.readouterr()
    assert "finished already: loss 2.0000" in said.err
    assert "failed: out of memory (exit code 2" in said.err
    assert "best     trial 1: optim.learning_rate=1e-5 seed=1, loss 2.0000" in said.out
    assert [line.split()[0] for line in said.out.splitlines()[1:5]] == ["1", "2", "4", "3"]
    # More values: what is there is not run again, but what failed is.
    calls.clear()
    assert main([*asked[:-1], "seed=1,2,3"]) == 0
    assert len(calls) == 3
    # Other settings are another sweep.
    assert main([*asked, "batch.epochs=3"]) == 2
    assert "holds a sweep with another batch.epochs" in capsys.readouterr().err


def test_trials_are_drawn(rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, lambda given: float(given["optim.learning_rate"]))
    asked = ["sweep", *rows, "optim.learning_rate=1e-5..1e-3", "seed=1,2"]
    assert main([*asked, f"output={tmp_path / 'a'}", "trials=5"]) == 0
    first = [(call["optim.learning_rate"], call["seed"]) for call in calls]
    assert len(set(first)) == 5
    calls.clear()
    assert main([*asked, f"output={tmp_path / 'a'}", "trials=7"]) == 0
    assert len(calls) == 2  # the five are there
    pytest.importorskip("optuna")
    calls.clear()
    assert main([*asked, f"output={tmp_path / 'b'}", "trials=25", "search=tpe"]) == 0
    rates = [float(call["optim.learning_rate"]) for call in calls]
    # It has found out where low values are; half of what is drawn at random lies above.
    assert sorted(rates[-10:])[7] < 1e-4


def test_a_combination_that_is_wrong_is_named(
    rows: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = stand_in(monkeypatch, lambda given: 1.0)
    asked = ["sweep", *rows, f"output={tmp_path / 'out'}"]
    assert main([*asked, "adapter.method=none,lora", "adapter.rank=8,16"]) == 0
    assert len(calls) == 2  # a rank without an adapter is an error
    assert "says how to adapt, but `method` is none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["optim.learning_rate=1e-5"], "nothing to sweep over"),
        (["optim.learnin_rate=1,2"], "did you mean `optim.learning_rate`"),
        (["seed=1..5"], "trials=N"),
        (["output=a,b"], "all trials must share it"),
        (["seed=1,2", "trials=0"], "whole number"),
        (["seed=1,2", "search=psychic"], "allowed: random, tpe"),
        (["seed=1,2", "data.eval_split=0.0"], "held-out rows are needed"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    rows: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: list[str],
    message: str,
) -> None:
    calls = stand_in(monkeypatch, lambda given: 1.0)
    more = [each for each in rows if each.split("=")[0] not in {a.split("=")[0] for a in asked}]
    output = [] if asked[0].startswith("output") else [f"output={tmp_path / 'out'}"]
    assert main(["sweep", *more, *output, *asked]) == 2
    assert message in capsys.readouterr().err
    assert not calls
    assert not (tmp_path / "out").exists()


def test_a_process_is_ended_with_the_sweep(tmp_path: Path) -> None:
    sleeps = [
        sys.executable,
        "-c",
        "import os, time; print(os.getpid(), flush=True); time.sleep(60)",
    ]
    began = time.monotonic()
    assert (
        run_process(sleeps, tmp_path / "log", lambda: (tmp_path / "log").stat().st_size > 0) is None
    )
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log").read_text()), 0)
    assert run_process([sys.executable, "-c", "print(1); exit(3)"], tmp_path / "log") == 3


@pytest.mark.slow
def test_a_sweep_for_real(tmp_path: Path) -> None:
    """Killed in the midst, and continued; one trial diverges."""
    model = tiny.folder(tmp_path / "model")
    rows = "".join(json.dumps(row) + "\n" for row in tiny.pairs(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    command = [
        sys.executable, "-m", "sftx", "sweep", f"model={model}", "data=rows.jsonl",
        "data.eval_split=0.2", "data.cache=cache", "output=out", "runtime.device=cpu",
        "optim.max_grad_norm=0", "optim.max_bad_steps=0", "batch.epochs=3",
        "optim.learning_rate=1e-4,3e38,3e-3",
    ]  # fmt: skip
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out/trial-2.log").exists():
        time.sleep(0.2)
        assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 75
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "finished already" in done.stderr
    assert "was not finite" in done.stderr
    assert "best     trial 3: optim.learning_rate=3e-3" in done.stdout
    assert len(list((tmp_path / "out").glob("trial-?"))) == 3
