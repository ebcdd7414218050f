"""A run knows its base again: another model under the same name is neither continued nor merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import sftx
from sftx.cli import main
from sftx.model.same_files import digest_of
from sftx.training import loop

pytestmark = pytest.mark.usefixtures("no_prediction_of_time")


def other_base(path: Path) -> None:
    """Put a model of the same shape, a little further trained, in the place of the one in a folder."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(path)


def test_another_base_is_neither_continued_nor_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "model"
    run = {
        "model": tiny.folder(base),
        "data": {"rows": tiny.pairs(6), "cache": str(tmp_path / "cache"), "workers": 0},
        "output": str(tmp_path / "run"),
        "adapter": "lora",
        "batch": {"steps": 3, "examples_per_step": 2},
        "checkpoint": {"every": 1},
        "eval": {"at_start": False},
        "runtime": {"progress": False, "report": False},
    }
    monkeypatch.setattr(loop, "finish", lambda *_: None)  # as if it were killed there
    sftx_steps = sftx.steps(**run)
    for record in sftx_steps:
        if record.step == 2:
            break
    sftx_steps.close()
    monkeypatch.undo()
    other_base(base)
    with pytest.raises(sftx.UserError, match=r"(?s)other settings or data.*model\.files"):
        sftx.train(**run)
    assert main(["export", str(tmp_path / "run"), "step=1"]) == 2
    assert "holds another model" in capsys.readouterr().err
    checkpoint = {"every": 1, "resume_allow": ["model.files"]}
    assert sftx.train(**(run | {"checkpoint": checkpoint})).steps == 3
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "model.files" in facts["changed"][0]


def test_a_run_of_an_earlier_version_is_continued(tmp_path: Path) -> None:
    facts = tmp_path / "run" / "run.json"
    run = {
        "model": tiny.folder(tmp_path / "model"),
        "data": {"rows": tiny.pairs(2), "cache": str(tmp_path / "cache"), "workers": 0},
        "output": str(tmp_path / "run"),
        "batch": {"steps": 1},
        "runtime": {"progress": False, "report": False},
    }
    sftx.train(**run)
    said = json.loads(facts.read_text())
    assert said["mathematics"]["model"].pop("files")
    facts.write_text(json.dumps(said))
    assert list(sftx.steps(**run)) == []


def test_the_digest_is_of_weights_and_configuration(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    tiny.folder(whole)
    digest = digest_of(str(whole))
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
