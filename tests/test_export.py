"""`sftx export`: merged = adapter, in folders that load, from finished runs and checkpoints."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sftx
from sftx.cli import main

ROWS = [[f"What is {i} plus one?", f"<calc>It is {i + 1}."] for i in range(16)]
IDS = torch.tensor([[264, 20, 31, 30, 264, 40, 9]])


def run(output: Path, tied: bool = True, **changes: Any) -> Path:
    path = tiny.folder(output.parent / "model", tie_word_embeddings=tied)
    settings: dict[str, Any] = {
        "model": {"path": path, "add_tokens": ["<calc>"]},
        "data": {"rows": ROWS, "cache": str(output.parent / "cache")},
        "output": str(output),
        "batch": {"examples_per_step": 8, "epochs": 2},
        "optim": {"learning_rate": 1e-2},
        "runtime": {"progress": False, "device": "cpu", "threads": 1},
    }
    sftx.train(**settings | changes)
    return output


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize(
    ("method", "tied"),
    [
        ("lora", True),
        ("lora", False),
        pytest.param("rslora", True, marks=pytest.mark.slow),
        ("dora", False),
    ],
)
def test_merged_is_the_adapter(
    method: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", tied, adapter={"method": method, "rank": 4})
    assert main(["export", str(folder), f"to={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert float(said.partition("moved by ")[2].split()[0]) < 1e-5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base.resize_token_embeddings(265, mean_resizing=False)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, folder).eval()(IDS).logits
    assert float((logits(tmp_path / "out") - adapted).abs().max()) < 1e-5
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<calc>") == 264
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert (
        tokenizer.convert_tokens_to_ids("<|end|>")
        in GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    )


@pytest.mark.parametrize("method", ["none", "lora"])
def test_a_checkpoint_becomes_a_folder(method: str, tmp_path: Path) -> None:
    adapter = {"method": method} | ({"rank": 4} if method == "lora" else {})
    folder = run(
        tmp_path / "run", adapter=adapter, checkpoint={"every": 1, "keep": 9}, batch={"steps": 3}
    )
    assert main(["export", str(folder), "step=2"]) == 0
    exported = load_file(folder / "exported" / "model.safetensors")
    saved = load_file(folder / "checkpoints" / "step-00000002" / "weights.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    if method == "none":
        expected = saved[f"model.{name}.weight"]
    else:
        base = load_file(tmp_path / "model" / "model.safetensors")[f"{name}.weight"]
        a, b = (saved[f"model.{name}.lora_{kind}.default.weight"] for kind in "AB")
        expected = base + 32 / 4 * b @ a
        assert float((expected - base).abs().max()) > 1e-3
    assert float((exported[f"{name}.weight"] - expected).abs().max()) < 1e-6
    assert logits(folder / "exported").shape[-1] == 265
    assert main(["export", str(folder), f"to={tmp_path / 'last'}", "dtype=bf16"]) == 0
    last = load_file(tmp_path / "last" / "model.safetensors")
    assert {tensor.dtype for tensor in last.values()} == {torch.bfloat16}
    assert float((last[f"{name}.weight"].float() - expected).abs().max()) > 1e-3


def test_a_checkpoint_of_partly_frozen_weights_becomes_a_whole_folder(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")
    model = {"path": path, "unfrozen_layers": 1}
    folder = run(tmp_path / "run", model=model, checkpoint={"every": 1}, batch={"steps": 2})
    assert main(["export", str(folder), "step=1"]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (Path(path), folder / "exported"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("model.layers.1.", "model.norm.")) for name in changed)


def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", batch={"steps": 1})
    (tmp_path / "taken").mkdir()
    for arguments, message in (
        ([], "the folder of a run"),
        ([str(tmp_path / "model")], "the folder of a run"),
        ([str(folder), f"to={tmp_path / 'taken'}"], "is not overwritten"),
        ([str(folder), "step=7"], "there are []"),
        ([str(folder), "too=x"], "did you mean `to`"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_killed_export_left_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = run(tmp_path / "run", batch={"steps": 1}), tmp_path / "out"
    killed = (
        "import os, signal, sys\nfrom sftx.cli import main\nfrom sftx.training import hand_over\n"
        "def save(folder, *_):\n    (folder / 'half').write_text('x')\n    os.kill(os.getpid(), "
        "signal.SIGKILL)\n"
        "hand_over.save_model = save\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", killed, "export", str(folder), f"to={target}"], check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    [left] = tmp_path.glob(".out.export-*")
    assert (left / "half").exists()
    (target / ".model.tmp").mkdir(parents=True)  # as an earlier version left it
    (target / ".model.tmp" / "half").write_text("x")
    assert main(["export", str(folder), f"to={target}"]) == 0
    assert not left.exists()
    assert sorted(path.name for path in target.glob(".*")) == []
    assert logits(target).shape[-1] == 265
    assert main(["export", str(folder), f"to={target}"]) == 2
    assert "is not overwritten" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = run(tmp_path / "run", batch={"steps": 1}), tmp_path / "out"

    def fail(*_: Any) -> None:
        raise sftx.UserError("planted")

    monkeypatch.setattr("sftx.training.hand_over.save_model", fail)
    assert main(["export", str(folder), f"to={target}"]) == 2
    assert not target.exists()
    assert not list(tmp_path.glob(".out.*"))
    (target / ".model.tmp").mkdir(parents=True)
    (target / "mine.txt").write_text("kept")
    assert main(["export", str(folder), f"to={target}"]) == 2  # not ours to take over
    assert (target / "mine.txt").read_text() == "kept"
