"""Every example of the project runs, on a tiny model, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftx import cli
from sftx.settings.load import load_config

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model, output = tiny.folder(tmp_path / "model"), tmp_path / "out"
    changes = [
        f"model={model}",
        f"output={output}",
        "data.max_length=128",
        f"data.cache={tmp_path}",
        "data.workers=0",
    ]
    assert cli.main(["train", str(path), *changes]) == 0
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(steps[0], len(lines) + steps[0]))
    assert steps[0] == (0 if "eval" in load_config(str(path)).model_dump(exclude_unset=True) else 1)
    saved = output / "merged" if (output / "merged").exists() else output
    AutoModelForCausalLM.from_pretrained(saved)
    AutoTokenizer.from_pretrained(saved)
