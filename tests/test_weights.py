"""How weights are kept: bf16 with stochastic rounding, and a base in 4 bits under an adapter."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sftx
from sftx.cli import main
from sftx.data.pack import build_pack
from sftx.model.adapter import attach
from sftx.model.load import load_model
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.settings.schema import Config, Model
from sftx.training.optim import StochasticAdamW, random_bits, with_moments

ROWS = [[f"What is {i} plus one?", f"It is {i + 1}."] for i in range(16)]
with_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)


def settings(path: str, output: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": path,
        "data": {"rows": ROWS, "cache": str(output.parent / "cache")},
        "output": str(output),
        "batch": {"examples_per_step": 8, "epochs": 3},
        "optim": {"learning_rate": 1e-3},
        "runtime": {"progress": False, "device": "cpu", "threads": 1},
    }
    return tiny.merged(base, changes)


def steps(
    weight: torch.Tensor, number: int, rate: float, kind: type[torch.optim.AdamW]
) -> torch.Tensor:
    """The weight after steps whose gradient is 1 everywhere, so that each moves it by the learning
    rate.
    """
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = kind([parameter], lr=rate, weight_decay=0.0, fused=True)
    if kind is StochasticAdamW:
        with_moments(optimizer)
    for step in range(number):
        if isinstance(optimizer, StochasticAdamW):
            optimizer.seed = step
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return parameter.detach()


def test_small_updates_are_lost_by_naive_rounding_and_kept_by_stochastic_rounding() -> None:
    weight = torch.ones(20_000, dtype=torch.bfloat16)
    moved = 50 * 1e-5  # less than half of the spacing of bf16 just below 1, which is 2^-8
    assert torch.equal(steps(weight, 50, 1e-5, torch.optim.AdamW), weight)
    after = steps(weight, 50, 1e-5, StochasticAdamW)
    assert 1 - 5 * 2**-8 < float(after.min()) < float(after.max()) == 1.0
    # Binomial: the mean of 20,000 weights has a standard deviation of sqrt(moved * 2^-8 / 20000) =
    # 1e-5.
    assert float((1 - after.float()).mean()) == pytest.approx(moved, abs=5e-5)
    assert torch.equal(after, steps(weight, 50, 1e-5, StochasticAdamW))
    assert torch.equal(steps(-weight, 1, 0.0, StochasticAdamW), -weight)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = StochasticAdamW([parameter], lr=1.0)
    with_moments(optimizer)
    parameter.grad, optimizer.found_inf = torch.full_like(weight, float("nan")), torch.ones(())
    optimizer.step()
    assert torch.equal(parameter, weight)


def test_rounding_bits_belong_to_the_place_of_a_weight() -> None:
    cpu, first = torch.device("cpu"), 2**32 - 1000  # the numbers begin again on the way
    whole = random_bits(first, 1 << 18, cpu)
    parts = [random_bits(first + at, 1 << 16, cpu) for at in range(0, 1 << 18, 1 << 16)]
    assert torch.equal(whole, torch.cat(parts))
    counts = torch.bincount(whole, minlength=1 << 16)
    assert len(counts) == 1 << 16
    chi_squared = float(
        ((counts - 4.0) ** 2 / 4).sum()
    )  # 65,535 degrees of freedom: a standard deviation of 362
    assert abs(chi_squared - 65_535) < 5 * 362
    assert not torch.equal(whole, random_bits(first + 0x9E3779B9, 1 << 18, cpu))


def test_rounding_is_within_one_place_of_the_exact_update() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000).bfloat16()
    exact = steps(weight.float(), 1, 1e-3, torch.optim.AdamW)
    after = steps(weight, 1, 1e-3, StochasticAdamW).float()
    assert float(((after - exact) / exact).abs().max()) < 2**-7
    assert not torch.equal(after, exact.bfloat16().float())


def test_a_run_in_bf16_learns_says_so_and_continues_to_the_bit(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")
    extra = {
        "optim": {"weights": "bf16_stochastic"},
        "runtime": {"precision": "bf16"},
        "checkpoint": {"every": 2},
        "data": {"eval_rows": ROWS},
    }
    whole = sftx.train(**settings(path, tmp_path / "whole", **extra))
    assert whole.eval_before is not None
    assert whole.eval_after is not None
    assert whole.eval_after["loss"] < whole.eval_before["loss"] - 0.1
    assert any(
        "rounded at random" in n
        for n in json.loads((whole.folder / "run.json").read_text())["notes"]
    )
    config = settings(path, tmp_path / "killed", **extra)
    for record in sftx.steps(**config):
        if record.step == 4:
            break
    again = sftx.train(**config)
    ours, theirs = (load_file(r.folder / "model.safetensors") for r in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "lm_head.weight" not in theirs, "tied, and stored once"
    with pytest.raises(sftx.UserError, match=r"set runtime\.precision: bf16"):
        sftx.train(**settings(path, tmp_path / "other", optim={"weights": "bf16_stochastic"}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"weights": "bf16_stochastic"}, "adapter": "lora"}, "without an adapter"),
        ({"adapter": {"quantize": "nf4"}}, "method"),
    ],
)
def test_contradictions_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"model": "m", "data": "d", "output": "o", **sections})


@with_bitsandbytes
def test_gradients_through_a_base_in_4_bits_are_those_of_its_dequantised_weights(
    tmp_path: Path,
) -> None:
    path = tiny.folder(tmp_path / "model", hidden_size=64, intermediate_size=128)
    adapter = Config.model_validate(
        {"model": "m", "data": "d", "output": "o", "adapter": "lora"}
    ).adapter
    pack = to_tensors(build_pack(tiny.examples([20, 13])), torch.device("cpu"))
    gradients = []
    for dequantise in (False, True):
        model = load_model(Model(path=path), torch.device("cpu"), nf4=torch.float32)
        model = model.dequantize() if dequantise else model
        attach(model, adapter, seed=0)
        loss = PackLoss(model)
        loss.eval()
        with torch.no_grad():
            loss(
                pack
            )  # bitsandbytes may repack its weights here, through which no gradient would come
        loss.train()
        loss(pack).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in loss.parameters() if p.grad is not None])
        )
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-5


@with_bitsandbytes
def test_qlora_trains_and_is_exported_as_it_was_trained(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model", hidden_size=64, intermediate_size=128)
    adapter = {"method": "lora", "rank": 4, "quantize": "nf4"}
    extra = {"data": {"eval_rows": ROWS}, "optim": {"learning_rate": 1e-2}}
    result = sftx.train(**settings(path, tmp_path / "run", adapter=adapter, **extra))
    assert result.eval_before is not None
    assert result.eval_after is not None
    assert result.eval_after["loss"] < result.eval_before["loss"] - 0.1
    facts = json.loads((result.folder / "run.json").read_text())
    full = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
    assert facts["parameters"]["all"] == full + facts["parameters"]["trainable"]
    assert main(["export", str(result.folder)]) == 0
    exported = sftx.train(
        **settings(
            str(result.folder / "exported"),
            tmp_path / "after",
            data={"eval_rows": ROWS},
            batch={"epochs": 1},
        )
    )
    assert exported.eval_before is not None
    assert exported.eval_before["loss"] == pytest.approx(result.eval_after["loss"], rel=1e-5)
    assert "quantization_config" not in json.loads(
        (result.folder / "exported" / "config.json").read_text()
    )
    again = sftx.train(
        **settings(path, tmp_path / "on", adapter=adapter | {"path": str(result.folder)}, **extra)
    )
    assert again.eval_before == result.eval_after


def test_4_bits_without_bitsandbytes_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftx.model.load.find_spec", lambda name: None)
    path = tiny.folder(tmp_path / "model")
    with pytest.raises(sftx.UserError, match=r"pip install 'sftx\[qlora\]'"):
        sftx.train(
            **settings(path, tmp_path / "run", adapter={"method": "lora", "quantize": "nf4"})
        )
