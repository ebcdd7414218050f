"""Two equal runs leave equal folders, to the byte; only clocks and memory differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sftx.model.adapter import attach
from sftx.model.save import save_model
from sftx.settings.schema import Config

MEASURED = {
    "started",
    "measured",
    "predicted",
    "seconds",
    "seconds_left",
    "tokens_per_second",
    "memory",
}
"""What a clock or the operating system says: in run.json and in every line of metrics.jsonl."""
CODE = """
import sys, sftx
rows = [[f"What is {i} plus one?", f"It is {i + 1}."] for i in range(12)]
method = sys.argv[1]
sftx.train(
    model="model", data={"rows": rows, "eval_split": 0.2, "cache": "cache", "workers": 0},
    output="run",
    adapter={"method": method} | ({"rank": 2, "dropout": 0.1} if method != "none" else {}),
    batch={"examples_per_step": 4, "epochs": 1}, checkpoint={"every": 1},
    runtime={"progress": False, "device": "cpu", "threads": 1},
)
"""


def test_an_adapters_config_is_written_in_order(tmp_path: Path) -> None:
    model = tiny.model()
    sections: dict[str, Any] = {
        "model": "m",
        "data": "d",
        "output": "o",
        "adapter": {"method": "lora"},
    }
    adapted = attach(model, Config.model_validate(sections).adapter, 0)
    save_model(tmp_path, adapted, tiny.tokenizer(), [2], "", torch.float32)  # type: ignore[arg-type]
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 6
    assert targets == sorted(targets)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "none"])
def test_two_equal_runs_leave_equal_folders(method: str, tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):  # of Python's hashes, by which sets are ordered
        home = tmp_path / seed
        tiny.folder(home / "model")
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", CODE, method], cwd=home, env=environment, check=True)
        found.append(
            {
                path.relative_to(home / "run"): path
                for path in (home / "run").rglob("*")
                if path.is_file()
            }
        )
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert len(ours) > 8
    for name in sorted(ours):
        assert _told(ours[name]) == _told(theirs[name]), name


def _told(path: Path) -> Any:
    """The bytes of a file; of those that hold measurements, all the rest."""
    match path.name:
        case "metrics.jsonl":
            return [_but(MEASURED, json.loads(line)) for line in path.read_text().splitlines()]
        case "run.json" | "state.json":
            return _but(MEASURED, json.loads(path.read_text()))
        case "MANIFEST.json":  # the sizes and hashes of the files of a checkpoint
            return _but({"metrics.jsonl", "state.json"}, json.loads(path.read_text()))
        case "report.html":  # made of the other files, and of measurements
            return None
        case _:
            return path.read_bytes()


def _but(left_out: set[str], fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in left_out}
