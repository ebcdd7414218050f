"""What a caller of `sftx.steps` may do between two steps, and what a finished run gives back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sftx
from sftx.training import checkpoint

ROWS = [[f"What is {i} plus one?", f"It is {i + 1}."] for i in range(40)]


def settings(path: str, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of five steps with held-out rows."""
    base: dict[str, Any] = {
        "model": path,
        "data": {
            "rows": ROWS,
            "eval_split": 0.1,
            "cache": str(output.parent / "cache"),
            "workers": 0,
        },
        "output": str(output),
        "batch": {"examples_per_step": 8, "steps": 5},
        "optim": {"learning_rate": 3e-3},
        "runtime": {"progress": False, "device": "cpu", "threads": 1},
    }
    return tiny.merged(base, changes)


def records(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def logits(trained: Any) -> torch.Tensor:
    with torch.no_grad():
        return trained(input_ids=torch.arange(8, 40)[None], use_cache=False).logits.float()


def test_looking_at_the_model_between_steps_changes_nothing(model: str, tmp_path: Path) -> None:
    plain = sftx.train(**settings(model, tmp_path / "plain"))
    steps = sftx.steps(**settings(model, tmp_path / "watched"))
    assert (steps.step, steps.num_steps) == (0, 5)
    before = logits(steps.model)
    assert torch.equal(before, logits(AutoModelForCausalLM.from_pretrained(model)))
    for record in steps:
        assert steps.step == record.step
        assert not steps.model.training
        looked_at: Any = steps.model  # no type of transformers says that it generates
        written = looked_at.generate(torch.tensor([[5, 40]]), max_new_tokens=3, do_sample=False)
        assert written.shape[1] <= 5
    for ours, theirs in zip(records(tmp_path / "watched"), records(plain.folder), strict=True):
        assert (ours["loss"], ours["eval"]) == (theirs["loss"], theirs["eval"])
    with pytest.raises(sftx.UserError, match="the run is over"):
        _ = steps.model
    assert torch.equal(logits(steps.result.model), logits(plain.model))


def test_a_checkpoint_saved_between_steps_is_of_the_step_last_seen(
    model: str, tmp_path: Path
) -> None:
    whole = sftx.train(**settings(model, tmp_path / "whole"))
    config = settings(model, tmp_path / "cut")
    steps = sftx.steps(**config)
    seen: dict[str, torch.Tensor] = {}
    for record in steps:
        if record.step == 3:
            assert steps.save().name == "step-00000003"
            seen = {name: tensor.clone() for name, tensor in steps.model.state_dict().items()}
            break
    steps.close()
    saved = load_file(tmp_path / "cut" / "checkpoints" / "step-00000003" / "weights.safetensors")
    assert all(
        torch.equal(tensor, seen[name.removeprefix("model.")]) for name, tensor in saved.items()
    )
    result = sftx.train(**config)
    assert [line["loss"] for line in records(result.folder)] == [
        line["loss"] for line in records(whole.folder)
    ]
    for name, tensor in load_file(whole.folder / "model.safetensors").items():
        assert torch.equal(tensor, load_file(result.folder / "model.safetensors")[name])


def test_an_evaluation_between_steps_is_the_one_that_the_settings_would_make(
    model: str, tmp_path: Path
) -> None:
    every = sftx.train(**settings(model, tmp_path / "every", eval={"every": 1}))
    steps = sftx.steps(**settings(model, tmp_path / "asked", eval={"at_start": False}))
    first = steps.evaluate()
    found = {0: first} | {record.step: steps.evaluate() for record in steps}
    assert found == {line["step"]: line["eval"] for line in records(every.folder)}
    assert found == {line["step"]: line["eval"] for line in records(tmp_path / "asked")}
    assert found[5]["loss"] < found[0]["loss"]


def test_a_run_that_is_stopped_is_finished_and_says_after_which_step(
    model: str, tmp_path: Path
) -> None:
    config = settings(model, tmp_path / "run")
    steps = sftx.steps(**config)
    last = 0
    for record in steps:
        last = record.step
        if last == 2:
            steps.stop()
    assert steps.result.steps == last == 2
    assert (steps.result.eval_after or {})["loss"] == records(tmp_path / "run")[-1]["eval"]["loss"]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["status"], facts["ended_at"], facts["num_steps"]) == ("finished", 2, 5)
    assert "2 of 5 steps" in (tmp_path / "run" / "README.md").read_text()
    assert list(sftx.steps(**config)) == []
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_what_cannot_be_asked_for_is_refused(model: str, tmp_path: Path) -> None:
    data = {"rows": ROWS, "cache": str(tmp_path / "cache"), "workers": 0}
    steps = sftx.steps(**{**settings(model, tmp_path / "run"), "data": data})
    with pytest.raises(sftx.UserError, match="no held-out rows"):
        steps.evaluate()
    with pytest.raises(sftx.UserError, match="not come to its end"):
        _ = steps.result
    steps.close()
    with pytest.raises(sftx.UserError, match="the run is over"):
        steps.save()
    with pytest.raises(sftx.UserError, match=r"batch\.epoch"):
        sftx.steps(**settings(model, tmp_path / "run", batch={"epoch": 2}))


@pytest.mark.parametrize("adapter", [{}, {"method": "lora", "rank": 4}])
def test_a_result_holds_the_trained_model_its_tokenizer_and_its_numbers(
    model: str, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    more = {"adapter": adapter, "model": {"path": model, "add_special_tokens": ["<|new|>"]}}
    result = sftx.train(**settings(model, tmp_path / "run", **more))
    assert isinstance(result.model, PeftModel) == bool(adapter)
    assert not result.model.training
    assert result.tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert len(result.tokenizer.encode("<|new|>")) == 1
    assert [record.step for record in result.metrics] == [0, 1, 2, 3, 4, 5]
    assert result.metrics[-1].loss == result.loss
    assert result.metrics[0].eval == result.eval_before
    assert result.metrics[-1].eval == result.eval_after
    text = result.tokenizer.apply_chat_template(
        [{"role": "user", "content": ROWS[0][0]}], add_generation_prompt=True
    )
    trained: Any = result.model
    assert (
        trained.generate(
            torch.tensor([text["input_ids"]]), max_new_tokens=2, do_sample=False
        ).shape[1]
        > 2
    )


def test_leaving_the_loop_frees_the_run(model: str, tmp_path: Path) -> None:
    """Nothing holds the run but its iterator: it ends with it, not when the collector comes."""
    for _ in sftx.steps(**settings(model, tmp_path / "run")):
        break
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None
    sftx.train(**settings(model, tmp_path / "run"))
