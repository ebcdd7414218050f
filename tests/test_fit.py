"""Which packs and how many recomputed layers are chosen, from the memory at hand; and what is said
of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import sftx
from sftx.model import host_memory
from sftx.model.compile import KEPT
from sftx.model.memory import MemoryEstimator
from sftx.model.pack_loss import PackLoss
from sftx.model.runtime import Machine
from sftx.settings.schema import Runtime
from sftx.training.memory_plan import MARGIN, StepProfile, choose_packing, predict

CPU = Machine(torch.device("cpu"), torch.float32)
LOAD = StepProfile(longest=300, step_tokens=8192, target_share=0.5)


@pytest.fixture(scope="module")
def estimator() -> MemoryEstimator:
    return MemoryEstimator(PackLoss(tiny.model(num_hidden_layers=5)).train(), CPU, base=1000)


def needed(estimator: MemoryEstimator, size: int, layers: int) -> int:
    return int(predict(estimator, LOAD, size, layers).peak / MARGIN) + 1


@pytest.mark.slow
def test_packs_shrink_first_then_the_fewest_layers_are_recomputed(
    estimator: MemoryEstimator,
) -> None:
    def choose(available: int, **runtime: Any) -> tuple[int, int]:
        found = choose_packing(Runtime(**runtime), estimator, LOAD, available)
        return found.tokens_per_pack, found.recomputed

    assert choose(1 << 40) == (1024, 0)
    assert choose(needed(estimator, 1024, 0) - 2) == (512, 0)
    assert choose(needed(estimator, 512, 0)) == (512, 0)
    assert choose(needed(estimator, 512, 0) - 2) == (512, 1)
    assert choose(needed(estimator, 512, 3)) == (512, 3)
    assert choose(needed(estimator, 512, 5) - 2)[0] == 256
    assert choose(1 << 40, recompute=2) == (1024, 2)
    assert choose(1 << 40, recompute="all", tokens_per_pack=700) == (700, 5)
    with pytest.raises(
        sftx.UserError,
        match=r"(?s)predicted to need .* GiB .*optimizer.* available.*256 tokens.*5 layers",
    ):
        choose(2000)
    with pytest.raises(sftx.UserError, match=r"1,024 tokens.* 0 layers"):
        choose(needed(estimator, 1024, 0) - 2, recompute="none", tokens_per_pack=1024)


def test_a_continued_run_keeps_the_packs_it_had_while_they_fit(estimator: MemoryEstimator) -> None:
    assert choose_packing(Runtime(), estimator, LOAD, 1 << 40, earlier=700).tokens_per_pack == 700
    assert (
        choose_packing(
            Runtime(tokens_per_pack=90), estimator, LOAD, 1 << 40, earlier=700
        ).tokens_per_pack
        == 90
    )
    found = choose_packing(
        Runtime(recompute="none"), estimator, LOAD, needed(estimator, 512, 0), earlier=700
    )
    assert found.tokens_per_pack == 512
    assert found.notes == (
        "the run had packs of 700 tokens, which no longer fit: from here on it differs by rounding "
        "(and what dropout drops is another draw)",
    )


def test_compiled_layers_keep_less_and_get_larger_packs() -> None:
    estimator = MemoryEstimator(PackLoss(tiny.model(num_hidden_layers=5)).train(), CPU, base=1000)
    eager = predict(estimator, LOAD, 1024, 0)
    estimator.compiled = True
    assert predict(estimator, LOAD, 1024, 0).activations == pytest.approx(
        KEPT * eager.activations, rel=0.01
    )
    assert choose_packing(Runtime(), estimator, LOAD, 1 << 40).tokens_per_pack == 2048
    assert (
        choose_packing(Runtime(), estimator, LOAD, needed(estimator, 2048, 0) - 2).tokens_per_pack
        == 1024
    )


def test_what_cannot_be_rehearsed_is_said_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = PackLoss(tiny.model()).train()

    def depends_on_data(_: Any) -> None:
        raise RuntimeError("the shape depends on data")

    monkeypatch.setattr(loss, "forward", depends_on_data)
    found = choose_packing(Runtime(), MemoryEstimator(loss, CPU, 0), LOAD, 1 << 40)
    assert (found.tokens_per_pack, found.recomputed, found.memory) == (1024, 0, None)
    assert found.notes == ("memory could not be predicted: the shape depends on data",)


def test_a_run_records_prediction_and_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "model": tiny.folder(tmp_path / "model"),
        "data": {"rows": [["a", "b"]] * 8, "cache": str(tmp_path / "cache")},
        "runtime": {"device": "cpu", "threads": 1, "progress": False},
    }
    sftx.train(**settings, output=str(tmp_path / "run"))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    predicted, measured = facts["predicted"], facts["measured"]
    assert predicted["memory"]["peak"] == sum(
        v for k, v in predicted["memory"].items() if k != "peak"
    )
    assert predicted["memory"]["peak"] == pytest.approx(measured["memory"], rel=0.15)
    assert predicted["seconds"] > 0 < measured["seconds"]
    monkeypatch.setattr(host_memory, "free", lambda: 1000)
    with pytest.raises(sftx.UserError, match="memory: a step is predicted to need"):
        sftx.train(**settings, output=str(tmp_path / "short"))


def test_room_in_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "cgroup" / "jobs" / "one"
    group.mkdir(parents=True)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemFree: 1 kB\nMemAvailable:   8000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/jobs/one\n")
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "cgroup")
    assert host_memory.free() == 8000 << 10
    (group / "memory.max").write_text("max\n")
    assert host_memory.free() == 8000 << 10
    (group.parent / "memory.max").write_text("5000000\n")
    (group.parent / "memory.current").write_text("4000000\n")
    (group.parent / "memory.stat").write_text("anon 7\ninactive_file 300\n")
    assert host_memory.free() == 1000300
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert host_memory.free() == 500150
