"""`bench/gpu.py` in smoke mode: every part of it runs, on a CPU and a tiny shape."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def _bench_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "gpu.py"), "--smoke", "--minutes", "4"]
    command += ["--only", "full,fsdp,trl", "--json", str(tmp_path / "gpu.json")]
    command += ["--scratch", str(tmp_path / "scratch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    first = figures["first"]
    assert [*first][:3] == ["device", "run_full", "run_lora"]
    assert not [said for said in first.values() if "error" in said]
    assert first["deterministic_is_bitwise"]["answer"].startswith("equal")
    assert first["host_device_syncs"]["answer"] == {"per_step": 0.0, "sites": {}}
    assert first["gradient_llama_fp32"]["answer"]["gradient"] < 1e-6
    assert first["gradient_qwen3_moe_fp32"]["answer"]["gradient"] < 1e-6
    assert max(first["attention_fp32"]["answer"].values()) < 1e-6
    cells = {cell["name"]: cell for cell in figures["cells"]}
    if find_spec("trl") is None:
        failed = cells.pop("smoke/lora/512/trl-packing")["failed"]
        assert failed[0]["error"].startswith("not installed: trl")
    whole, sharded = cells["smoke/full/512/sftx"], cells["smoke/lora/512/sftx-fsdp"]
    assert not [cell["failed"] for cell in cells.values() if cell["failed"]]
    assert whole["loss"] == pytest.approx(sharded["loss"], rel=1e-4)  # an adapter begins with 0
    for cell in (whole, sharded):
        assert cell["tokens_per_second"] > 0 < cell["predicted"]
        assert {"gemm", "loss", "optimiser", "idle"} <= cell["profile"]["shares"].keys()
        assert sum(cell["profile"]["shares"].values()) == pytest.approx(1, abs=0.01)
        assert len(cell["profile"]["top"]) == 15
    assert done.stdout.strip().split("\n")[-1].startswith("gpu smoke=")


def test_a_question_that_kills_its_process_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    asked = []

    def ask(_: Any, work: dict[str, Any], __: float, told: Any) -> dict[str, Any]:
        asked.append([*work["names"]])
        if work["names"][0] == "kills":
            return {"error": "ended with -11, without a word", "traceback": "where"}
        told({"name": work["names"][0], "answer": 1, "seconds": 0.1})
        return {"error": "CUDA error: an illegal memory access"}

    monkeypatch.setattr(gpu, "ask", ask)
    args = argparse.Namespace(json=tmp_path / "gpu.json")
    found: dict[str, Any] = {"first": {}, "cells": []}
    assert gpu.first_stage(args, found, ["one", "kills", "two"], 60) == []
    assert asked == [["one", "kills", "two"], ["kills", "two"], ["two"]]
    kept = json.loads((tmp_path / "gpu.json").read_text())["first"]
    assert [said.get("answer") for said in kept.values()] == [1, None, 1]
    assert kept["kills"]["traceback"] == "where"


def test_a_failure_of_every_kind_of_cell_stays_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a device that answers, every cell fails; one process is late, one says nothing."""
    import gpu

    errors = ["CUDA out of memory", "layers do not compile: why", "not done after 240 s"]

    def ask(_: Any, work: dict[str, Any], __: float, told: Any = None) -> dict[str, Any]:
        if work["do"] == "first":
            here = {"cuda": True, "name": "NVIDIA H200", "memory_gib": 139.0}
            told({"name": "device", "answer": here, "seconds": 0.1})
            return {}
        return {"error": errors[len(work["name"]) % 3], "traceback": "where"}

    monkeypatch.setattr(gpu, "ask", ask)
    monkeypatch.setattr(gpu, "needed", lambda _: [])
    file = tmp_path / "gpu.json"
    options = ["--skip-checks", "--json", str(file), "--scratch", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    gpu.main()
    kept = json.loads(file.read_text())["cells"]
    assert [cell["name"] for cell in kept] == [cell["name"] for cell in gpu.cells(False)]
    assert {cell["system"] for cell in kept} == {
        *("sftx", "sftx-fsdp", "sftx-deterministic"),
        *("trl-packing", "trl-packing-liger", "unsloth"),
    }
    for cell in kept:
        assert cell["failed"]
        assert {entry["traceback"] for entry in cell["failed"]} == {"where"}
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert last.startswith("gpu qwen3-0.6b=none")


@pytest.mark.slow
def test_a_part_that_fails_leaves_its_traceback(tmp_path: Path) -> None:
    import gpu

    args = argparse.Namespace(scratch=tmp_path, smoke=True)
    done = gpu.ask(args, {"do": "cell", "system": "sftx", "shape": "unknown"}, 60)
    assert done["error"] == "KeyError: 'unknown'"
    assert "Traceback" in done["traceback"]


def test_waits_for_the_device_are_counted_by_place() -> None:
    import gpu_first

    with gpu_first.sync_sites() as sites:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered at ..)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [*sites.values()] == [3]
    assert "tests/test_bench_gpu.py" in next(iter(sites)).split(" < ")[0]


def test_shares_of_a_step_on_a_gpu() -> None:
    """4 ms of kernels in 8 ms, two of them at the same time for 1 ms: 5 of 8 ms are idle."""
    import gpu_profile

    def kernel(name: str, start: float, end: float) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name, device_type="DeviceType.CUDA", is_user_annotation=False, time_range=span
        )

    kernels = [kernel("nvjet_hsh", 0, 2000), kernel("flash_bwd", 1000, 2000)]
    kernels += [kernel("multi_tensor", 4000, 5000)]
    owner = SimpleNamespace(name="sftx optimiser", cpu_parent=None, kernels=[])
    launch = SimpleNamespace(
        name="aten::_fused_adamw_",
        cpu_parent=owner,
        kernels=[SimpleNamespace(name="multi_tensor", duration=1000)],
    )
    host = [SimpleNamespace(**vars(e), device_type="DeviceType.CPU") for e in (owner, launch)]
    for event in kernels:
        event.kernels, event.cpu_parent = [], None
    found = gpu_profile.shares([*kernels, *host], 0.008, cuda=True)
    shares = {kind: share for kind, share in found["shares"].items() if share}
    assert shares == {"gemm": 0.25, "attention": 0.125, "optimiser": 0.125, "idle": 0.625}
    assert found["top"][0] == {"name": "nvjet_hsh", "ms": 2.0, "calls": 1}


def test_flops_follow_the_formula() -> None:
    """6 per weight and token, less for LoRA, and half of the square of every segment's length in
    attention.
    """
    code = (
        "import gpu_table as gpu, json; base = dict(shape='smoke', tokens=100, targets=40, squares=3000)\n"
        "print(json.dumps([gpu.flops({**base, 'method': m}) for m in ('full', 'lora')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCH, check=True
    )
    body, head = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 64 * 1024
    rank16 = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    attention = 6 * 2 * 64 * 3000
    full = 6 * body * 100 + 6 * head * 40 + attention
    lora = 4 * body * 100 + 4 * head * 40 + attention + 6 * rank16 * 100
    assert json.loads(done.stdout) == [full, lora]
