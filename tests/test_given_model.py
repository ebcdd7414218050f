"""A model that comes as an object: trained as its folder would be, recorded, continued, and refused
where it must.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_control import ROWS, records, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sftx
from sftx import cli


def given(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return tiny.model(seed=seed, tie_word_embeddings=True, **changes)


def test_an_object_trains_as_its_folder_does(tmp_path: Path) -> None:
    model, tokenizer = given(), tiny.tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    theirs = sftx.train(**settings(str(tmp_path / "model"), tmp_path / "folder"))
    ours = sftx.train(**{**settings("", tmp_path / "object"), "model": model}, tokenizer=tokenizer)
    assert [line["loss"] for line in records(ours.folder)] == [
        line["loss"] for line in records(theirs.folder)
    ]
    for name, tensor in load_file(theirs.folder / "model.safetensors").items():
        assert torch.equal(tensor, load_file(ours.folder / "model.safetensors")[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation != "sftx_segments"


def test_a_run_of_an_object_continues_with_the_same_object_only(tmp_path: Path) -> None:
    config = {**settings("", tmp_path / "run"), "tokenizer": tiny.tokenizer()}
    whole = sftx.train(**{**config, "output": str(tmp_path / "whole"), "model": given()})
    steps = sftx.steps(**{**config, "model": given()})
    for record in steps:
        if record.step == 2:
            steps.save()
            break
    steps.close()
    with pytest.raises(sftx.UserError, match="started from another model"):
        sftx.train(**{**config, "model": given(seed=1)})
    assert len(list((tmp_path / "run" / "base").iterdir())) == 1
    result = sftx.train(**{**config, "model": given()})
    assert [line["loss"] for line in records(result.folder)] == [
        line["loss"] for line in records(whole.folder)
    ]


def test_a_run_of_an_object_can_be_repeated_from_its_folder(tmp_path: Path) -> None:
    config = {
        **settings("", tmp_path / "run"),
        "tokenizer": tiny.tokenizer(),
        "model": {"path": given(), "freeze": ["*norm*"]},
    }
    result = sftx.train(**config, adapter="none")
    again = tmp_path / "again"
    assert cli.main(["train", str(result.folder / "config.yaml"), f"output={again}"]) == 0
    assert [line["loss"] for line in records(again)] == [
        line["loss"] for line in records(result.folder)
    ]


def test_an_object_in_half_precision_and_an_adapter_on_it(tmp_path: Path) -> None:
    config = {**settings("", tmp_path / "run"), "adapter": {"method": "lora", "merge": True}}
    result = sftx.train(**{**config, "model": given().bfloat16()}, tokenizer=tiny.tokenizer())
    assert result.model.dtype == torch.bfloat16
    AutoModelForCausalLM.from_pretrained(result.folder / "merged")
    assert (
        AutoTokenizer.from_pretrained(result.folder / "merged").chat_template == tiny.CHAT_TEMPLATE
    )


class Changed(torch.nn.Linear):
    """A layer that no folder would bring back."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "case", ["no tokenizer", "adapter", "surgery", "meta", "tokenizer alone", "ranks"]
)
def test_an_object_that_cannot_be_recorded_is_refused(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = given()
    more: dict[str, Any] = {"tokenizer": tiny.tokenizer()}
    match case:
        case "no tokenizer":
            more, message = {}, "tokenizer"
        case "adapter":
            model, message = (
                get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
                "adapter.path",
            )
        case "surgery":
            model.model.layers[0].mlp.up_proj = Changed(32, 64, bias=False)
            message = "Changed"
        case "meta":
            model, message = model.to("meta"), "no contents"
        case "tokenizer alone":
            model, message = tiny.folder(tmp_path / "model"), "model.tokenizer"
        case _:
            monkeypatch.setenv("WORLD_SIZE", "2")
            message = "save_pretrained"
    with pytest.raises(sftx.UserError, match=message):
        sftx.train(**{**settings("", tmp_path / "run"), "model": model}, **more)
    assert not (tmp_path / "run" / "run.json").exists()


def test_settings_alone_take_no_object(tmp_path: Path) -> None:
    with pytest.raises(sftx.UserError, match=r"model: .*sftx\.train"):
        sftx.make_config(model=given(), data=ROWS, output=str(tmp_path))
    assert json.dumps(ROWS)


def test_a_run_that_ended_right_after_its_base_was_written_begins_again(tmp_path: Path) -> None:
    """What such a run leaves is its own: no stranger's folder."""
    config = {**settings("", tmp_path / "run"), "model": given(), "tokenizer": tiny.tokenizer()}
    with pytest.raises(sftx.UserError, match="positions of the model"):
        sftx.train(**{**config, "data": {**config["data"], "max_length": 100_000}})
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["base"]
    sftx.train(**config)
