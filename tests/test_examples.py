"""Every example of the project runs, on a tiny model, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftx import cli

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model, output = tiny.folder(tmp_path / "model"), tmp_path / "out"
    changes = [f"model={model}", f"output={output}", "data.max_length=128", f"data.cache={tmp_path}", "data.workers=0"]
    assert cli.main(["train", str(path), *changes]) == 0
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    saved = output / "merged" if (output / "merged").exists() else output
    AutoModelForCausalLM.from_pretrained(saved)
    AutoTokenizer.from_pretrained(saved)
