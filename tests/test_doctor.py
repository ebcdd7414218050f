"""`sftx doctor`: what is absent or broken is said, and never a traceback."""

from __future__ import annotations

import json
import re
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

from sftx import cli
from sftx.cli import doctor
from sftx.doctor import compute, host, packages
from sftx.doctor.advice import verdict
from sftx.doctor.check import Check

ROOT = Path(__file__).parents[1]
GPU = {"free": 80e9, "total": 85e9, "bf16": 1.0}


def test_the_verb_says_what_the_machine_can_do_within_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "WRITE_SECONDS", 0.1)
    monkeypatch.setattr(compute, "SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    assert cli.main(["doctor", "json=found.json", f"output={tmp_path}/runs"]) == 0
    assert time.process_time() - began < 15
    out = capsys.readouterr().out
    assert "fits: all weights of models up to about" in out
    assert "try: runtime.precision=" in out
    found = json.loads((tmp_path / "found.json").read_text())
    names = {check["name"] for check in found["checks"]}
    assert {"cores", "memory", "output", "cache", "torch", "GPU", "matmul bf16"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_the_supported_versions_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed: dict[str, tuple[str, str]] = {}
    for line in tomllib.loads(text)["project"]["dependencies"]:
        found = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", line)
        assert found, line
        listed[found[1]] = (found[2], found[3] or "")
    assert {name: listed[name] for name in packages.SUPPORTED} == packages.SUPPORTED


@pytest.mark.parametrize(
    ("version", "found"),
    [
        (None, "not installed"),
        ("5.2", "5.2 is too old"),
        ("6.0.1", "6.0.1 is newer than is known"),
        ("5.20.0+local", "5.20.0+local (>=5.17,<6)"),
        ("main", "main (>=5.17,<6)"),
    ],
)
def test_a_version_outside_of_the_range_is_a_problem(
    version: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"transformers": version}
    monkeypatch.setattr(packages, "installed", lambda name: versions.get(name, "99"))
    check = next(check for check in packages.needed() if check.name == "transformers")
    assert check.found == found
    assert (check.state == "problem") == (not found.endswith(")"))
    assert check.state == "ok" or check.advice == "pip install 'transformers>=5.17,<6'"


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = {check.name: check for check in host.disks(str(tmp_path / "file"))}
    assert found["output"].state == "problem"
    assert found["output"].advice == "choose another folder with output=FOLDER"


def test_little_room_and_a_slow_disk_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "WRITE_SECONDS", 0.01)
    monkeypatch.setattr(host, "SLOW_DISK", 1e15)
    assert "checkpoint.background" in next(host.disks(str(tmp_path))).advice
    monkeypatch.setattr(host, "LITTLE_DISK", 1 << 60)
    assert "12 bytes a weight" in next(host.disks(str(tmp_path))).advice


def test_without_torch_the_rest_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "WRITE_SECONDS", 0.01)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.run() == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "cannot be imported" in out
    assert "not ready: PyTorch" in out


def test_a_gpu_whose_driver_is_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor = "H100", 9, 0

    def broken(number: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    gpu, nccl = compute.gpus()
    assert (gpu.state, gpu.found) == ("problem", "H100: CUDA error: out of memory")
    assert nccl.found == "not tried: there is one GPU"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (8 << 30, 80 << 30))
    gpu, _ = compute.gpus()
    assert gpu.state == "note"
    assert "more than half" in gpu.advice


@pytest.mark.slow
def test_two_processes_reach_each_other_and_ones_that_do_not_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compute, "REACH_SECONDS", 60)
    assert "all_reduce works" in compute.reach("gloo", "2 processes").found
    monkeypatch.setattr(compute, "_REACH", "import time; time.sleep(60)")
    monkeypatch.setattr(compute, "REACH_SECONDS", 0.5)
    found = compute.reach("gloo", "2 processes")
    assert (found.state, found.found) == ("problem", "2 processes: no answer within 0.5 s")


def test_the_verdict_follows_the_figures() -> None:
    fp32 = Check("compute", "matmul fp32", "", figures={"flops": 1e11})
    bf16 = Check("compute", "matmul bf16", "", figures={"flops": 3e11})
    memory = Check("machine", "memory", "", figures={"free": 16e9})
    on_cpu = verdict([memory, fp32, bf16], has_bitsandbytes=True)
    assert "fits: all weights of models up to about 700 M; with adapter=lora" in on_cpu[0]
    assert "nf4" not in on_cpu[0]
    assert "runtime.precision=bf16: products are 3.0 times" in on_cpu[1]
    gpu = Check("compute", "GPU 0", "", figures=GPU)
    on_gpu = verdict([memory, gpu, gpu], has_bitsandbytes=True)
    assert "about 3.5 B; with adapter=lora up to about 23 B, with adapter.quantize=nf4" in on_gpu[0]
    assert on_gpu[2].startswith("all 2 GPUs: sftx train run.yaml nproc=gpu")
    old = Check("compute", "GPU 0", "", figures={**GPU, "bf16": 0.0})
    assert "no bf16" in verdict([old], has_bitsandbytes=False)[1]
    broken = Check("packages", "torch", "2.1 is too old", "problem")
    assert verdict([broken], has_bitsandbytes=False)[0] == "not ready: torch: 2.1 is too old"
