"""Trackers: what they get is what metrics.jsonl holds, and whatever they do, training goes on."""

from __future__ import annotations

import json
import re
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny

import sftx
from sftx.report import trackers
from sftx.report.send import send
from sftx.report.trackers import Feed, Tail, card_of, numbers_of, tracking
from sftx.settings.make import make_config
from sftx.types import UserError

STEPS = 4


class StandIn:
    """Stands in for the package `wandb`, and keeps what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.inits: list[dict[str, Any]] = []
        self.exits: list[int] = []
        module: Any = ModuleType("wandb")
        module.__spec__ = ModuleSpec("wandb", None)
        module.init = self.init
        module.Table = lambda columns, data: (columns, data)
        monkeypatch.setitem(sys.modules, "wandb", module)
        monkeypatch.setattr(trackers, "EVERY", 0.01)

    def init(self, **given: Any) -> StandIn:
        self.inits.append(given)
        return self

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self, exit_code: int) -> None:
        self.exits.append(exit_code)


def settings(model: str, tmp_path: Path, **more: Any) -> dict[str, Any]:
    rows = tiny.pairs(10)
    return {
        "model": model,
        "data": {"rows": rows[:8], "eval_rows": rows[8:], "cache": str(tmp_path / "cache")},
        "output": str(tmp_path / "run"),
        "batch": {"examples_per_step": 4, "steps": STEPS},
        "eval": {"every": 2},
        "runtime": {"device": "cpu", "threads": 1},
        "track": "wandb",
        **more,
    }


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_tracker_gets_what_the_record_holds(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = StandIn(monkeypatch)
    sftx.train(**settings(model, tmp_path))
    assert [step for step, _ in tool.logged] == list(range(STEPS + 1))
    for (_, numbers), record in zip(tool.logged, lines(tmp_path), strict=True):
        expected = {f"eval/{name}": value for name, value in (record["eval"] or {}).items()}
        found = {name: value for name, value in numbers.items() if name.startswith("eval/")}
        assert {name.replace("_", " ") for name in found} == {
            name.replace("_", " ") for name in expected
        }
        assert found.get("eval/loss") == expected.get("eval/loss")
        assert numbers.get("train/loss") == record["loss"]
        assert ("train/learning_rate" in numbers) == (record["step"] > 0)
    assert [step for step, numbers in tool.logged if "eval/loss" in numbers] == [0, 2, 4]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert tool.inits[0]["id"] == facts["tracker_id"] != ""
    assert tool.inits[0]["name"] == "run"
    assert tool.inits[0]["config"]["batch"]["steps"] == STEPS
    assert tool.exits == [0]


def test_names_are_those_that_people_of_these_tools_expect() -> None:
    record = {
        "step": 3, "loss": 1.5, "learning_rate": 1e-4, "grad_norm": None, "epoch": 0.5,
        "targets": 30, "seconds": 2.0, "tokens_per_second": 20.0, "memory": 5, "tokens": 40,
        "total_tokens": 120, "total_targets": 90, "num_steps": 9, "seconds_left": 3.0,
        "eval": {"loss": 2.0, "loss of ../a b.jsonl": 2.5, "general loss": 3.0},
    }  # fmt: skip
    assert numbers_of(record) == {
        "train/loss": 1.5,
        "train/learning_rate": 1e-4,
        "train/epoch": 0.5,
        "train/seconds": 2.0,
        "train/tokens_per_second": 20.0,
        "train/targets_per_second": 15.0,
        "train/memory": 5,
        "train/total_tokens": 120,
        "train/total_targets": 90,
        "eval/loss": 2.0,
        "eval/loss_of_.._a_b.jsonl": 2.5,
        "eval/general_loss": 3.0,
    }


@pytest.mark.parametrize("failure", ["import", "init", "log", "exit", "finish", "disk", "hangs"])
def test_a_tracker_that_fails_never_stops_training(
    model: str,
    tmp_path: Path,
    failure: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = StandIn(monkeypatch)
    if failure == "hangs":
        monkeypatch.setattr(trackers, "PATIENCE", 1.2)

    def fails(*_: Any, **__: Any) -> Any:
        if failure == "exit":
            sys.exit(1)
        if failure == "disk":
            raise OSError(28, "No space left on device", "wandb/run")
        if failure == "hangs":
            time.sleep(30)
        raise ConnectionError("no route to host")

    if failure == "import":
        monkeypatch.delattr(sys.modules["wandb"], "init")
    elif failure == "finish":
        tool.finish = fails
    elif failure in ("init", "hangs"):
        monkeypatch.setattr(sys.modules["wandb"], "init", fails)
    else:
        tool.log = fails
    sftx.train(**settings(model, tmp_path))
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1
    assert said[0].startswith("warning  track: wandb")
    assert "sftx report RUN to=wandb" in said[0]
    assert [line["step"] for line in lines(tmp_path)] == list(range(STEPS + 1))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    again = StandIn(monkeypatch)  # what was not taken can be sent
    if failure != "finish":
        assert send(tmp_path / "run", "wandb") == STEPS + 1
        assert [step for step, _ in again.logged] == list(range(STEPS + 1))
    assert send(tmp_path / "run", "wandb") == 0


def test_a_run_that_is_continued_continues_in_its_tracker(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = StandIn(monkeypatch)
    given = settings(model, tmp_path)
    steps = sftx.steps(**given)
    for record in steps:
        if record.step == 2:
            steps.save()
        if record.step == 3:
            break
    steps.close()
    before = len(tool.logged)
    assert before == 4
    sftx.train(**given)
    assert [step for step, _ in tool.logged] == list(range(STEPS + 1))  # none of them twice
    assert tool.inits[0]["id"] == tool.inits[1]["id"]
    assert tool.exits == [1, 0]


def test_a_run_that_begins_anew_is_another_one(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = StandIn(monkeypatch)
    given = settings(model, tmp_path)
    steps = sftx.steps(**given)
    next(steps)
    steps.close()  # nothing was saved
    sftx.train(**given)
    assert tool.inits[0]["id"] != tool.inits[1]["id"]
    assert [step for step, _ in tool.logged] == [0, 1, 0, 1, 2, 3, 4]


def test_a_package_that_is_missing_is_named_before_training(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlflow is not installed: pip install 'sftx\[mlflow\]'"):
        sftx.train(**settings(model, tmp_path, track=["mlflow"]))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="track: found 'wandbb'"):
        make_config(**settings(model, tmp_path, track="wandbb"))


def test_none_is_contacted_unless_named_and_only_by_the_main_rank(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = StandIn(monkeypatch)
    sftx.train(**settings(model, tmp_path, track=[]))
    assert not tool.inits
    config = make_config(**settings(model, tmp_path / "other"))
    with tracking(trackers.Run(config, writes=False), config.track, print):
        pass
    assert not tool.inits


def test_samples_go_along_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = StandIn(monkeypatch)
    facts = {"status": "finished", "config": {}, "mathematics": {}, "precision": "float32"}
    facts |= {"device": "cpu", "tokens_per_pack": 1, "num_steps": 1}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    sample = {"step": 0, "prompt": "a", "output": "b", "reference": "c", "ended": True, "tokens": 1}
    (tmp_path / "samples.jsonl").write_text(json.dumps({**sample, "scores": {"exact": 0.5}}) + "\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval": {"loss": 1.0}}\n')
    assert send(tmp_path, "wandb") == 1
    columns, rows = tool.logged[0][1]["samples"]
    assert dict(zip(columns, rows[0], strict=True)) == {
        "prompt": "a", "output": "b", "reference": "c", "ended": True, "tokens": 1, "exact": 0.5,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"run\.json"):
        send(tmp_path / "nothing", "wandb")


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    tail.read()
    path.write_text('{"step": 1, "loss": 5}\n{"step": 2, "lo')
    tail.read()
    assert sorted(tail.by_step) == [1]
    path.write_text('{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n')
    tail.read()
    assert sorted(tail.by_step) == [1, 2]
    path.write_text('{"step": 1, "loss": 6}\n{"step": 2, "loss": 3}\n{"step": 3, "loss": 2}\n')
    tail.read()
    assert {step: found[-1]["loss"] for step, found in tail.by_step.items()} == {1: 6, 2: 3, 3: 2}


def test_the_last_step_waits_for_its_held_out_numbers(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "running", "eval_before": {"loss": 9.0}}')
    path = tmp_path / "metrics.jsonl"
    feed = Feed(card_of(tmp_path), "wandb")
    path.write_text('{"step": 1, "eval": null}\n')
    assert [step.number for step in feed.take(over=False)] == []
    path.write_text('{"step": 1, "eval": {"loss": 1}}\n{"step": 2, "eval": null}\n')
    assert [(s.number, s.record["eval"]["loss"]) for s in feed.take(over=False)] == [(0, 9), (1, 1)]
    assert [step.number for step in feed.take(over=True)] == [2]
    assert [step.number for step in feed.take(over=True)] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_each_tracker_for_real(
    model: str, tmp_path: Path, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network: what it has is read back by its own means."""
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_PROJECT", tmp_path.name)
    given = settings(model, tmp_path, track=[name])
    steps = sftx.steps(**given)
    for record in steps:
        if record.step == 2:
            steps.save()
            break
    steps.close()
    sftx.train(**given)
    assert (tmp_path / "run" / f".sent.{name}").read_text().endswith(f" {STEPS}\n")
    expected = [(line["step"], line["loss"]) for line in lines(tmp_path)[1:]]
    found = READ_BACK[name](tmp_path)
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected])


def _of_tensorboard(tmp_path: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing import (  # pyright: ignore[reportMissingImports]
        event_accumulator,
    )

    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def _of_wandb(tmp_path: Path) -> list[tuple[int, float]]:
    """From the bytes of its files: it has no reader for them but its server."""
    found = []
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        text = path.read_bytes()
        values = re.findall(rb"(?s)train/loss\x82\x01.([0-9.e-]+)", text)
        steps = re.findall(rb"(?s)_step\x82\x01.([0-9]+)", text)
        # Each of them stands in the file twice: as history and as summary.
        trained = [int(step) for step in steps if int(step) > 0]
        found += dict(zip(trained, map(float, values), strict=True)).items()
    return found


def _of_mlflow(tmp_path: Path) -> list[tuple[int, float]]:
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

    client = MlflowClient()
    experiment = client.get_experiment_by_name("sftx")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["batch.steps"] == str(STEPS)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return [(metric.step, metric.value) for metric in history]


def _of_trackio(tmp_path: Path) -> list[tuple[int, float]]:
    import trackio  # pyright: ignore[reportMissingImports]
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    (name,) = SQLiteStorage.get_runs(tmp_path.name)
    logs = SQLiteStorage.get_logs(tmp_path.name, name)
    trackio.delete_project(tmp_path.name, force=True)
    return [(line["step"], line["train/loss"]) for line in logs if "train/loss" in line]


READ_BACK: dict[str, Any] = {
    "tensorboard": _of_tensorboard,
    "wandb": _of_wandb,
    "mlflow": _of_mlflow,
    "trackio": _of_trackio,
}
