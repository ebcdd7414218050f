"""The optimiser step against the same step in float64, one example at a time, with torch's own
clipping and AdamW.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import sftx
from sftx.data.pack import build_pack
from sftx.model.pack_loss import PackLoss, Tally, TensorPack, to_tensors
from sftx.settings.schema import Config
from sftx.training import loop
from sftx.training.optim import build_optimizer
from sftx.training.step import train_step

CPU = torch.device("cpu")
PACKS = [(0, 1), (), (2,), (3, 4)]
OPTIM = Config.model_validate(
    {
        "model": "m",
        "data": "d",
        "output": "o",
        "optim": {"weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-3},
    }
).optim


def reference_step(
    model: Any, optimizer: torch.optim.Optimizer, data: list[Any], rate: float, limit: float
) -> Any:
    """(loss, gradient norm before clipping) of a step that is taken."""
    optimizer.zero_grad()
    loss = tiny.naive_loss(model, data)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return float(loss), float(norm)


@pytest.mark.parametrize("limit", [0.0, 0.05, 1e6])
def test_steps_are_those_of_float64(limit: float) -> None:
    model, data = tiny.model(), tiny.examples([5, 40, 2, 23, 31])
    twin = copy.deepcopy(model).double()
    loss, optimizer = PackLoss(model), build_optimizer(model, OPTIM)
    decayed = [
        n
        for n, p in model.named_parameters()
        if id(p) in {id(q) for q in optimizer.param_groups[0]["params"]}
    ]
    groups = [
        {"params": [p for n, p in twin.named_parameters() if n in decayed], "weight_decay": 0.1},
        {
            "params": [p for n, p in twin.named_parameters() if n not in decayed],
            "weight_decay": 0.0,
        },
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-3)
    packs = [to_tensors(build_pack([data[i] for i in members]), CPU) for members in PACKS]
    weight = float(sum(example.weights[1:].astype(float).sum() for example in data))
    for rate in (
        1e-2,
        3e-3,
        1e-2,
    ):  # the second would see gradients that the first left, and moments it had lost
        result = train_step(loss, optimizer, packs, weight, rate, limit, nullcontext)
        expected = reference_step(twin, reference, data, rate, limit)
        value, _, norm, bad = result.read()
        assert value == pytest.approx(expected[0], rel=1e-5)
        assert norm == pytest.approx(expected[1], rel=1e-4)
        assert not bad
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert float((ours - theirs).abs().max()) < 1e-5, name
        assert ours.grad is None


class InfiniteSlope(PackLoss):
    """A finite loss whose gradient is not a number."""

    def forward(self, pack: TensorPack, tally: Tally | None = None) -> torch.Tensor:
        return super().forward(pack, tally) + (self.model.lm_head.weight.sum() * 0).sqrt()


def test_a_finite_loss_with_a_gradient_that_is_no_number_changes_nothing() -> None:
    model, data = tiny.model(), tiny.examples([5, 40])
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, OPTIM)
    packs = [to_tensors(build_pack(data), CPU)]
    loss, _, _, bad = train_step(
        InfiniteSlope(model), optimizer, packs, 9.0, 1e-2, 1.0, nullcontext
    ).read()
    assert 0 < loss < 100
    assert bad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(
        float(moment.abs().max()) == 0
        for state in optimizer.state.values()
        for moment in state.values()
    )


def test_the_rate_that_is_recorded_is_the_one_that_is_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[float] = []
    taken = loop.train_step

    def watched(*args: Any) -> Any:
        applied.append(args[4])
        return taken(*args)

    monkeypatch.setattr(loop, "train_step", watched)
    records = sftx.steps(
        model=tiny.folder(tmp_path / "model"),
        data={"rows": ["a text", "another text"], "cache": str(tmp_path / "cache"), "workers": 0},
        output=str(tmp_path / "run"),
        batch={"examples_per_step": 1, "epochs": 3},
        optim={"learning_rate": 1e-3, "warmup": 2, "schedule": "linear"},
        runtime={"progress": False, "device": "cpu", "threads": 1, "tokens_per_pack": 64},
    )
    assert [record.learning_rate for record in records] == applied
    assert applied == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
