"""What a checkpoint holds, which of them stay, and which settings a run may not change when it is
continued.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch

from sftx.settings.schema import Config
from sftx.training import checkpoint
from sftx.training.optim import build_optimizer
from sftx.training.run_identity import mathematics
from sftx.types import UserError

BASE: dict[str, Any] = {"model": "m", "data": "d", "output": "o"}
OPTIM = Config.model_validate(BASE).optim


def state(step: int) -> checkpoint.State:
    return checkpoint.State(step, "plan", {}, 10 * step, step)


def trained(seed: int, steps: int = 2) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """A model after some steps, whose moments are therefore all different."""
    model = tiny.model(seed=seed)
    optimizer = build_optimizer(model, OPTIM)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for step in range(steps):
        torch.manual_seed(seed + step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def contents(model: torch.nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Every weight, and every number that the optimizer remembers of it."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {
            f"{name} {kind}": value.clone() for kind, value in optimizer.state[parameter].items()
        }
    return found


def test_weights_and_all_moments_come_back_to_the_bit(tmp_path: Path) -> None:
    model, optimizer = trained(seed=0, steps=3)
    checkpoint.save(tmp_path, state(3), model, optimizer, keep=2)
    other, fresh = trained(seed=7, steps=1)
    restored = checkpoint.restore(tmp_path, other, fresh)
    assert restored == state(3)
    expected, found = contents(model, optimizer), contents(other, fresh)
    assert len(expected) == 4 * len(list(model.parameters()))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    model, optimizer = trained(seed=0)
    costs: dict[int, float] = {}
    for step, cost in enumerate([3.0, 1.0, 2.0, None, 2.5, 4.0], 1):
        if cost is not None:
            costs[step] = cost
        checkpoint.save(tmp_path, state(step), model, optimizer, keep=2, costs=costs)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002",
        "step-00000005",
        "step-00000006",
    ]
    # A better step that was not saved changes nothing.
    checkpoint.save(tmp_path, state(7), model, optimizer, keep=1, costs={**costs, 99: 0.5})
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step-00000002", "step-00000007"]
    shutil.rmtree(tmp_path / "step-00000007")
    checkpoint.save(tmp_path, state(6), model, optimizer, keep=2, costs=costs)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.step == 6


def test_what_changes_after_a_save_on_a_thread_is_not_in_it(tmp_path: Path) -> None:
    model, optimizer = trained(seed=0)
    before = contents(model, optimizer)
    later: list[Any] = []
    checkpoint.save(
        tmp_path, state(2), model, optimizer, keep=1, background=Mock(start=later.append)
    )
    assert not list(tmp_path.glob("step-*"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    later[0]()
    checkpoint.restore(tmp_path, model, optimizer)
    assert all(
        torch.equal(value, before[name]) for name, value in contents(model, optimizer).items()
    )


def test_a_disk_without_room_is_refused_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(seed=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(
        checkpoint, "save_file", Mock(side_effect=AssertionError("tensors were written"))
    )
    with pytest.raises(UserError, match=r"MiB needed, 0\.0 MiB free"):
        checkpoint.save(tmp_path, state(1), model, optimizer, keep=1)
    assert not list(tmp_path.glob("step-*"))


def test_weights_that_ranks_disagree_about_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(seed=0)
    asked = Mock(side_effect=UserError("the weights of rank 1 are no longer those of its peers"))
    monkeypatch.setattr(checkpoint, "check_replicas", asked)
    with pytest.raises(UserError, match="rank 1"):
        checkpoint.save(tmp_path, state(1), model, optimizer, keep=1)
    assert asked.call_args.args[0].keys() == {name for name, _ in model.named_parameters()}
    assert not list(tmp_path.glob("step-*"))


def facts(**changes: Any) -> dict[str, Any]:
    """`mathematics` of a run with other settings, by their dotted names."""
    given = copy.deepcopy(BASE)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            given[section] = {**given.get(section, {}), field: value}
        else:
            given[section] = value
    return mathematics(Config.model_validate(given), "fingerprint", 64, torch.float32)


DECIDES: list[dict[str, Any]] = [
    {"model": "other"},
    {"batch__examples_per_step": 3},
    {"batch__shuffle": False},
    {"optim__learning_rate": 1e-3},
    {"optim__max_grad_norm": 0.5},
    {"loss__label_smoothing": 0.1},
    {"adapter__method": "lora"},
    {"seed": 1},
]
DOES_NOT_DECIDE: list[dict[str, Any]] = [
    {"output": "elsewhere"},
    {"runtime__tokens_per_pack": 64},
    {"runtime__threads": 1},
    {"checkpoint__every": 5},
]


def test_the_settings_that_decide_a_result_are_told_from_those_that_do_not() -> None:
    base = facts()
    assert all(facts(**changes) != base for changes in DECIDES)
    assert all(facts(**changes) == base for changes in DOES_NOT_DECIDE)
    config = Config.model_validate(BASE)
    others = [
        ("other", 64, torch.float32),
        ("fingerprint", 65, torch.float32),
        ("fingerprint", 64, torch.bfloat16),
    ]
    assert all(mathematics(config, *other) != base for other in others)
