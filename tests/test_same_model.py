"""A run knows its base again: another model under the same name is neither continued nor merged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import sftx
from sftx.cli import main
from sftx.model.same_files import digest_of

pytestmark = pytest.mark.usefixtures("no_predictions")


def other_base(path: Path) -> None:
    """Put a model of the same shape, a little further trained, in the place of the one in a folder."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(path)


def changed(run: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """The sections of a run with others in their place."""
    return {**run, **sections}


@pytest.mark.slow
def test_another_base_is_neither_continued_nor_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "model"
    run: dict[str, Any] = {
        "model": tiny.folder(base),
        "data": {"rows": tiny.pairs(6), "cache": str(tmp_path / "cache"), "workers": 0},
        "output": str(tmp_path / "run"),
        "adapter": "lora",
        "batch": {"steps": 3, "examples_per_step": 2},
        "checkpoint": {"every": 1},
        "eval": {"at_start": False},
        "runtime": {"progress": False, "report": False},
    }
    steps = sftx.steps(**run)
    for record in steps:
        if record.step == 2:
            break
    steps.close()
    other_base(base)
    with pytest.raises(sftx.UserError, match=r"(?s)other settings or data.*model\.files"):
        sftx.train(**run)
    assert main(["export", str(tmp_path / "run"), "step=1"]) == 2
    assert "holds another model" in capsys.readouterr().err
    checkpoint = {"every": 1, "resume_allow": ["model.files"]}
    assert sftx.train(**changed(run, checkpoint=checkpoint)).steps == 3
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "model.files" in facts["changed"][0]


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_continued(tmp_path: Path) -> None:
    facts = tmp_path / "run" / "run.json"
    rows = {"rows": tiny.pairs(2), "eval_rows": tiny.pairs(3)}
    run: dict[str, Any] = {
        "model": tiny.folder(tmp_path / "model"),
        "data": {**rows, "cache": str(tmp_path / "cache"), "workers": 0},
        "output": str(tmp_path / "run"),
        "batch": {"steps": 1},
        "runtime": {"progress": False, "report": False},
    }
    sftx.train(**run)
    said = json.loads(facts.read_text())
    assert said["mathematics"]["model"].pop("files")
    assert said["mathematics"]["data"].pop("held_out")
    facts.write_text(json.dumps(said))
    assert list(sftx.steps(**run)) == []
    run["data"]["eval_rows"] = tiny.pairs(4)
    sftx.train(**changed(run, output=str(tmp_path / "new")))
    run["data"]["eval_rows"] = tiny.pairs(5)
    with pytest.raises(sftx.UserError, match=r"(?s)other settings or data.*data\.held_out"):
        sftx.train(**changed(run, output=str(tmp_path / "new")))


def test_the_digest_is_of_weights_and_configuration(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    tiny.folder(whole)
    digest = digest_of(str(whole))
    os.mkfifo(whole / "strange.safetensors")  # would be waited for
    assert digest_of(str(whole)) == digest
    (whole / "strange.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert digest_of(str(tmp_path / "parts")) == digest
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    assert digest_of(str(whole)) == digest
    (whole / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert digest_of(str(whole)) != digest
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        for place in (0, -1):
            flat[place] += 1
            model.save_pretrained(tmp_path / "other")
            assert digest_of(str(tmp_path / "other")) != digest, (name, place)
            flat[place] -= 1
        break
