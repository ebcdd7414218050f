"""`sftx eval`: numbers against oracles of their own, an adapter beside its base, bounds, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sftx import encode
from sftx.cli import main

ROWS = [
    {"prompt": f"{text} is", "completion": f"{text} of {i}"} for i, text in enumerate(tiny.WORDS)
]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return tiny.folder(tmp_path / "model")


def _eval(tmp_path: Path, *arguments: str) -> dict[str, dict]:
    out = tmp_path / "out.json"
    fast = ["prompts=3", "new_tokens=6", "runtime.device=cpu", "runtime.progress=false"]
    assert main(["eval", *arguments, *fast, f"json={out}"]) == 0
    return json.loads(out.read_text())


def _naive(path: str, adapter: str | None = None) -> float:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    data = [example for row in ROWS for example in encode(row, tiny.tokenizer())]
    with torch.no_grad():
        return float(tiny.naive_loss(model.eval(), data))


def test_a_model_beside_another(tmp_path: Path, folder: str, rows: str) -> None:
    other = tiny.folder(tmp_path / "other", hidden_size=64)
    found = _eval(tmp_path, folder, rows, f"base={other}", "metrics=exact,f1")
    assert found["model"]["numbers"]["loss"] == pytest.approx(_naive(folder), rel=1e-6)
    assert found["base"]["numbers"]["loss"] == pytest.approx(_naive(other), rel=1e-6)
    assert found["model"]["numbers"]["kl"] > 0
    assert "kl" not in found["base"]["numbers"]
    samples = found["model"]["samples"]
    assert [sample["reference"] for sample in samples] == [ROWS[i]["completion"] for i in (0, 4, 8)]
    mean = sum(sample["scores"]["f1"] for sample in samples) / 3
    assert found["model"]["numbers"]["f1"] == pytest.approx(mean)


@pytest.mark.slow
def test_an_adapter_beside_its_base(tmp_path: Path, folder: str, rows: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    found = _eval(tmp_path, str(tmp_path / "adapter"), rows)
    adapted = _naive(folder, str(tmp_path / "adapter"))
    assert found["model"]["numbers"]["loss"] == pytest.approx(adapted, rel=1e-6)
    assert found["base"]["numbers"]["loss"] == pytest.approx(_naive(folder), rel=1e-6)
    assert found["model"]["numbers"]["kl"] > 0
    same = _eval(tmp_path, folder, rows, f"base={folder}")
    assert same["model"]["numbers"]["kl"] == 0
    assert same["base"]["samples"] == found["base"]["samples"]  # the same base, the same answers
    made = f"rows={tmp_path / 'made.jsonl'}"
    for alone in ("base=false", made):
        only = _eval(tmp_path, str(tmp_path / "adapter"), rows, alone)
        assert list(only) == ["model"]
        assert only["model"]["samples"] == found["model"]["samples"]
        assert "kl" not in only["model"]["numbers"]
    both = _eval(tmp_path, str(tmp_path / "adapter"), rows, made, f"base={folder}")
    assert both == found


def test_bounds_make_the_exit_code(folder: str, rows: str, capfd: pytest.CaptureFixture) -> None:
    common = ["eval", folder, rows, "prompts=0", "runtime.device=cpu"]
    assert main([*common, "min.loss=0.1", "max.loss=1000"]) == 0
    assert main([*common, "max.loss=0.1"]) == 1
    assert "missed: loss is" in capfd.readouterr().out
    assert main([*common, "max.lost=0.1"]) == 2
    assert "there are: loss, perplexity, targets" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metrics=exactly"], "metric 'exactly' is not known"),
        (["metrics=own.py:f"], "there is no file own.py"),
        (["prompts=some"], "expected a whole number of at least 0"),
        (["new_tokens=0"], "expected a whole number of at least 1"),
        (["min.loss=low"], "min.loss='low': a number is needed"),
        (["more.jsonl", "yet.jsonl"], "without a key it takes MODEL DATA"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(
    arguments: list[str],
    message: str,
    folder: str,
    rows: str,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sftx.cli.eval.load_served", pytest.fail)
    assert main(["eval", folder, rows, *arguments]) == 2
    assert message in capfd.readouterr().err


def test_plain_texts_have_no_prompt(
    tmp_path: Path, folder: str, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "the river and the stone"}\n' * 3)
    found = _eval(tmp_path, folder, str(path))
    assert found["model"]["samples"] == []
    assert "0 prompts" in capfd.readouterr().out
