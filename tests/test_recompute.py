"""Recomputed layers: the same loss and the same gradients to the bit, with less kept for the
backward pass.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Literal

import pytest
import test_loss
import tiny
import torch

import sftx
from sftx.data.pack import build_pack
from sftx.model.adapter import attach
from sftx.model.checkpointing import decoder_layers, recompute
from sftx.model.memory import MemoryEstimator
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.model.runtime import Machine
from sftx.settings.schema import Adapter, Runtime
from sftx.training.memory_plan import StepProfile, choose_packing
from sftx.types import UserError

PACK = to_tensors(build_pack(tiny.examples([20, 33, 7])), torch.device("cpu"))
DROPOUT = {"Llama": {"attention_dropout": 0.2}, "GPT2": {}}  # GPT-2's own is 0.1 in three places
FAMILIES = {**test_loss.FAMILIES, **DROPOUT}


def gradients(loss: PackLoss, count: int) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Loss, gradients, and bytes kept for the backward pass when `count` layers are recomputed."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    recompute(loss.model, count)
    loss.zero_grad()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(PACK)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    kept.clear()
    value.backward()
    return value.detach(), [p.grad.clone() for p in loss.parameters() if p.grad is not None], size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_gradients_are_the_same_to_the_bit(family: str, adapter: str) -> None:
    model = tiny.model(family, **FAMILIES[family])
    if adapter == "lora":  # peft has no dropout for experts
        dropout = 0.0 if family in ("Mixtral", "Qwen3Moe") else 0.1
        attach(model, Adapter.model_validate({"method": adapter, "dropout": dropout}), 0)
    loss = PackLoss(model).train()
    value, plain, bytes_plain = gradients(loss, 0)
    for count in (1, 2):
        again, recomputed, bytes_recomputed = gradients(loss, count)
        assert torch.equal(value, again)
        assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
        assert bytes_recomputed < bytes_plain
        bytes_plain = bytes_recomputed


def test_a_model_without_layers_to_be_found_is_left_alone_or_refused() -> None:
    model = tiny.model()
    assert [type(layer).__name__ for layer in decoder_layers(model)] == ["LlamaDecoderLayer"] * 2
    with pytest.raises(UserError, match=r"runtime.recompute: 3 layers.*LlamaForCausalLM has 2"):
        recompute(model, 3)
    strange = torch.nn.Sequential(copy.deepcopy(model.lm_head))
    assert len(decoder_layers(strange)) == 0
    recompute(strange, 0)
    with pytest.raises(UserError, match="shows no decoder layers"):
        recompute(strange, 1)


@pytest.mark.slow
def test_the_setting_reaches_the_layers_and_changes_nothing(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")

    def run(recompute: Literal["auto", "none", "all"] | int) -> tuple[float | None, int]:
        folder = tmp_path / str(recompute)
        result = sftx.train(
            model=path,
            data={
                "rows": [[f"What is {i}?", "A number."] for i in range(8)],
                "cache": str(tmp_path / "cache"),
            },
            output=str(folder),
            batch={"steps": 2},
            runtime={"progress": False, "device": "cpu", "threads": 1, "recompute": recompute},
        )
        facts = json.loads((folder / "run.json").read_text())
        return result.loss, facts["recomputed_layers"]

    plain, one, every = run("none"), run(1), run("all")
    assert plain[0] == one[0] == every[0]
    assert (plain[1], one[1], every[1]) == (0, 1, 2)
    with pytest.raises(UserError, match=r"runtime.recompute: 7 layers"):
        run(7)
    with pytest.raises(UserError, match=r"runtime.recompute.*-1"):
        run(-1)


@pytest.mark.parametrize("count", ["all", 3])
def test_recomputing_layers_that_are_not_shown_is_refused_in_words(count: str | int) -> None:
    model = tiny.model("CTRL", n_embd=32, dff=64, n_layer=2, n_head=4, n_positions=256)
    estimator = MemoryEstimator(
        PackLoss(model).train(), Machine(torch.device("cpu"), torch.float32), 0
    )
    chosen = choose_packing(Runtime(recompute=count), estimator, StepProfile(40, 100, 0.5), 1 << 34)  # pyright: ignore
    with pytest.raises(
        UserError, match="CTRLLMHeadModel shows no decoder layers that can be recomputed"
    ):
        recompute(model, chosen.recomputed)
