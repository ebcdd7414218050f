"""Sweeps over trlx scripts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sftx.compat.trlx.sweep import main, make_study, read_config, suggest
from sftx.types import UserError

optuna = pytest.importorskip("optuna")

# Stands in for a training script: its record says how good a learning rate of 0.3 would be, and
# that seed 13 fails.
SCRIPT = """
import json, pathlib
import helper
import trlx
def main(hparams):
    if hparams["train.seed"] == 13:
        raise ValueError("unlucky")
    folder = pathlib.Path(hparams["train.checkpoint_dir"]) / "sftx"
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w") as file:
        for step in (1, 2):
            score = step - abs(hparams["optimizer.kwargs.lr"] - helper.BEST)
            told = {"metrics/score": score} if step == 2 else None
            line = {"step": step, "loss": 1 / step, "eval": told}
            file.write(json.dumps(line) + "\\n")
"""
CONFIG = """
tune_config: {mode: max, metric: metrics/score, search_alg: SEARCH, scheduler: SCHEDULER,
    num_samples: 2}
train.seed:
  strategy: grid
  values: [1, 13]
optimizer.kwargs.lr: {strategy: uniform, values: [0.0, 1.0]}
model.num_layers_unfrozen: {strategy: choice, values: [-1, 2]}
"""


@pytest.mark.parametrize(("search", "scheduler"), [("random", "fifo"), ("bayesopt", "hyperband")])
def test_a_sweep_tries_the_grid_and_keeps_the_best(
    tmp_path: Path, search: str, scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "helper.py").write_text("BEST = 0.3\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "sweep.yml").write_text(
        CONFIG.replace("SEARCH", search).replace("SCHEDULER", scheduler)
    )
    output = tmp_path / "out"
    arguments = [
        "--config",
        str(tmp_path / "sweep.yml"),
        str(tmp_path / "script.py"),
        "--output",
        str(output),
        "-y",
    ]
    assert main(arguments) == 0
    with (output / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["train.seed"], row["state"]) for row in rows] == [
        ("1", "COMPLETE"),
        ("13", "FAIL"),
    ] * 2
    best = json.loads((output / "best.json").read_text())
    good = [row for row in rows if row["state"] == "COMPLETE"]
    assert best["value"] == max(float(row["metrics/score"]) for row in good)
    assert best["value"] == pytest.approx(2 - abs(best["hparams"]["optimizer.kwargs.lr"] - 0.3))
    assert "unlucky" in (output / "trial_1" / "output.txt").read_text()
    assert "trial 1 fail" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("strategy", "values", "check"),
    [
        ("uniform", [2.0, 3.0], lambda x: 2 <= x <= 3),
        ("quniform", [0.0, 1.0, 0.25], lambda x: x in (0, 0.25, 0.5, 0.75, 1)),
        ("loguniform", [1e-5, 1e-1], lambda x: 1e-5 <= x <= 1e-1),
        ("loguniform", [1e-5, 1e-1, 10], lambda x: 1e-5 <= x <= 1e-1),
        (
            "qloguniform",
            [0.1, 10.0, 0.1],
            lambda x: 0.1 <= x <= 10.05 and abs(x * 10 - round(x * 10)) < 1e-6,
        ),
        ("randn", [5.0, 0.1], lambda x: 4 < x < 6),
        ("qrandn", [5.0, 1.0, 0.5], lambda x: x * 2 == int(x * 2)),
        ("randint", [3, 5], lambda x: x in (3, 4)),
        ("qrandint", [2, 10, 4], lambda x: x in (2, 6, 10)),
        ("lograndint", [1, 100], lambda x: 1 <= x < 100 and type(x) is int),
        ("qlograndint", [4, 64, 4], lambda x: x % 4 == 0 and type(x) is int),
        ("choice", ["a", [1], None], lambda x: x in ("a", [1], None)),
    ],
)
def test_strategies_stay_inside_their_bounds(
    strategy: str, values: list[object], check: object
) -> None:
    study = make_study({"mode": "min", "metric": "loss"})
    drawn = [suggest(study.ask(), "x", strategy, values) for _ in range(30)]
    assert all(check(x) for x in drawn)  # pyright: ignore[reportCallIssue]
    assert len({str(x) for x in drawn}) > 1


def test_mistakes_in_the_yaml_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.yml"
    path.write_text(
        "tune_config: {mode: up, metrik: loss}\nlr:\n  strategy: unifrom\n  values: [1, 2]\n"
        "x:\n  strategy: uniform\n  values: [1]\n"
    )
    with pytest.raises(UserError) as caught:
        read_config(str(path))
    assert [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()] == [
        "sweep.yml:1: tune_config.metrik: not known; mode, metric, search_alg, scheduler, "
        "num_samples are",
        "sweep.yml: tune_config: metric and mode (max or min) are needed",
        "sweep.yml:2: lr: strategy 'unifrom'; known: uniform, quniform, loguniform, qloguniform, "
        "randn, qrandn, "
        "choice, grid, randint, qrandint, lograndint, qlograndint",
        "sweep.yml:5: x: uniform takes 2 to 2 values, found [1]",
    ]
    assert main(["--config", "nowhere.yml", str(path)]) == 2
    assert capsys.readouterr().err == "error: nowhere.yml: no such file\n"
    with pytest.raises(UserError, match="search_alg"):
        make_study({"mode": "min", "metric": "loss", "search_alg": "psychic"})
