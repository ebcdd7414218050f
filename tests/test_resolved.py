"""`sftx plan` shows the settings as the run will have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from sftx import cli
from sftx.cli._resolved import MATTERS, lines, resolved
from sftx.settings.describe import settings
from sftx.settings.load import load_config


def test_what_is_set_and_what_stands_for_the_rest() -> None:
    overrides = ["model=m", "data=d.jsonl", "batch.steps=3", "adapter=lora", "data.eval_split=0.1"]
    config = load_config(None, overrides, ["output=unused"])
    found = resolved(config, ["output=unused"], {"optim.learning_rate": 2e-4})
    assert found["set"] == {
        "model.path": "m",
        "data.train": "d.jsonl",
        "data.eval_split": 0.1,
        "batch.steps": 3,
        "adapter.method": "lora",
    }
    default = found["default"]
    assert default["optim.learning_rate"] == 2e-4
    assert default["adapter.rank"] == 16
    assert default["eval.every"] == 0
    assert "batch.epochs" not in default
    assert lines(found)[:2] == ["set      model.path = m", "         data.train = d.jsonl"]


def test_defaults_that_play_no_part_are_left_out() -> None:
    overrides = ["model=m", "data=d", "output=o", "batch.tokens_per_step=9"]
    found = resolved(load_config(None, overrides), [], {})
    absent = {"adapter.rank", "eval.every", "batch.examples_per_step"}
    assert not absent & found["default"].keys()
    assert found["set"]["output"] == "o"


def test_every_setting_that_matters_exists() -> None:
    assert {*MATTERS} <= {*settings()}


def test_plan_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(["What is one plus one?", "Two."]) + "\n")
    model = tiny.folder(tmp_path / "model")
    where = f"json={tmp_path}/plan.json"
    assert cli.main(["plan", f"model={model}", f"data={rows}", "runtime.device=cpu", where]) == 0
    out = capsys.readouterr().out
    assert "default  model.save_dtype = fp32\n" in out
    assert "data.max_length = 256\n" in out
    assert "optim.learning_rate = 2e-05\n" in out
    assert "output = " not in out
    told = json.loads((tmp_path / "plan.json").read_text())["settings"]
    assert told["default"]["runtime.precision"] == "fp32"
