"""The README is what a newcomer types: its YAML and its Python run as they are printed, on a small
model.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny

from sftx import cli
from sftx.settings.load import load_config

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # which has a chat template, as the README's rows need one


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with the model under its name on the hub, and chats.jsonl in the README's
    third form.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    tiny.folder(tmp_path / HUB_NAME)
    pair, messages = (line for line in blocks("json")[1].splitlines() if line.startswith("{"))
    assert "prompt" in pair
    lines = [messages.replace("Paris", f"Paris {i}") for i in range(24)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_the_first_yaml_runs_as_printed(home: Path) -> None:
    (home / "run.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    assert load_config("run.yaml").model.path == HUB_NAME
    for verb in ("lint", "train"):
        assert cli.main([verb, "run.yaml", "runtime.threads=1", "data.workers=0"]) == 0
    assert (home / "runs" / "first" / "adapter_model.safetensors").exists()


def test_the_python_runs_as_printed(home: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (home / "runs" / "second" / "model.safetensors").exists()
    assert (home / "runs" / "third" / "model.safetensors").exists()
