"""CPU threads: what is asked for and what control groups leave is honoured, and shared cores are
measured.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from test_control import settings

import sftx
from sftx import cli, cores
from sftx.model import threads
from sftx.model.runtime import machine
from sftx.settings.schema import Runtime
from sftx.training import memory_plan


@pytest.fixture
def sixteen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 cores with two hardware threads each, of which this process may use all, and
    nothing is asked.
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    for name in ("PROC", "CGROUPS", "CPUS"):
        monkeypatch.setattr(cores, name, tmp_path / name)
    for cpu in range(32):
        write(
            tmp_path / f"CPUS/cpu{cpu}/topology/thread_siblings_list",
            f"{cpu % 16},{cpu % 16 + 16}\n",
        )
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quotas_of_control_groups_leave_fewer_cores(sixteen: Path) -> None:
    assert (cores.usable_cores(), cores.usable_cores(physical=True)) == (32, 16)
    write(sixteen / "PROC/self/cgroup", "0::/user/job\n")
    write(sixteen / "CGROUPS/user/job/cpu.max", "max 100000\n")
    assert cores.usable_cores(physical=True) == 16
    write(sixteen / "CGROUPS/user/cpu.max", "250000 100000\n")  # of the group above
    assert (cores.usable_cores(), cores.usable_cores(physical=True)) == (2, 2)
    write(sixteen / "CGROUPS/user/job/cpu.max", "50000 100000\n")
    assert cores.usable_cores() == 1


def test_quotas_of_control_groups_of_version_1(sixteen: Path) -> None:
    write(sixteen / "PROC/self/cgroup", "12:memory:/job\n4:cpu,cpuacct:/job\n0::/\n")
    write(sixteen / "CGROUPS/cpu,cpuacct/job/cpu.cfs_quota_us", "-1\n")
    write(sixteen / "CGROUPS/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n")
    assert cores.usable_cores() == 32
    write(sixteen / "CGROUPS/cpu,cpuacct/job/cpu.cfs_quota_us", "400000\n")
    assert cores.usable_cores() == 4


@pytest.mark.parametrize(
    ("environment", "setting", "expected"),
    [
        ({}, None, 16),
        ({"OMP_NUM_THREADS": "3"}, None, 3),
        ({"OMP_NUM_THREADS": "4,2"}, None, 4),
        ({"OMP_NUM_THREADS": "many"}, None, 16),
        ({"OMP_NUM_THREADS": "3"}, 5, 5),
        ({"LOCAL_WORLD_SIZE": "4"}, None, 4),
        (
            {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"},
            None,
            4,
        ),  # torchrun's own
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, None, 2),
    ],
)
def test_what_is_asked_for_comes_first(
    sixteen: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    setting: int | None,
    expected: int,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    with machine(Runtime(device="cpu", threads=setting)):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == before


def test_as_many_processes_encode_as_there_is_time_for(sixteen: Path) -> None:
    from sftx.data.store.encode_pool import usable_cores as workers

    write(sixteen / "PROC/self/cgroup", "0::/\n")
    write(sixteen / "CGROUPS/cpu.max", "300000 100000\n")
    assert workers() == 3


@pytest.mark.parametrize(
    ("seconds", "share", "expected"),
    [
        ({8: 1.0, 4: 0.5, 2: 0.4, 1: 0.3}, 0.95, 8),  # its own cores: nothing is tried
        ({8: 9.0, 4: 5.0, 2: 3.0, 1: 1.0}, 0.4, 1),
        ({8: 9.0, 4: 0.4, 2: 0.6, 1: 1.0}, 0.4, 4),
        ({8: 0.9, 4: 0.95, 2: 1.0, 1: 1.0}, 0.4, 1),  # hardly faster
    ],
)
def test_shared_cores_are_measured(seconds: dict[int, float], share: float, expected: int) -> None:
    assert threads.fastest(8, lambda count: (seconds[count], share)) == expected
    assert threads.fastest(1) == 1


def test_a_trial_measures_what_it_says() -> None:
    before = torch.get_num_threads()
    try:
        seconds, share = threads._trial(1)
    finally:
        torch.set_num_threads(before)
    assert 0 < seconds < 2
    assert 0 < share < 1.1


def test_a_run_keeps_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured at its start, written down, kept when it is continued; what is asked for then goes
    before.
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "default_threads", lambda runtime: runtime.threads or 2)
    found: list[int] = []
    monkeypatch.setattr(threads, "fastest", lambda most: found[-1])
    config = settings(tiny.folder(tmp_path / "model"), tmp_path / "run", runtime={"threads": None})
    before = torch.get_num_threads()

    def begin(**runtime: int) -> tuple[int, str]:
        for record in sftx.steps(**{**config, "runtime": {**config["runtime"], **runtime}}):
            if record.step == 1:
                break
        facts = json.loads((tmp_path / "run" / "run.json").read_text())
        return facts["threads"], " ".join(facts["notes"])

    found.append(1)
    kept, notes = begin()
    assert (kept, "other programs use these cores" in notes) == (1, True)
    found.append(2)
    kept, notes = begin()
    assert (kept, "keeps its 1 threads" in notes) == (1, True)
    kept, notes = begin(threads=2)
    assert (kept, "threads" in notes) == (2, False)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("verb", ["plan", "init"])
def test_time_is_predicted_with_the_threads_that_a_run_would_take(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With as many as there are cores, beside other work, minutes were told for seconds."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threads, "default_threads", lambda _: 2)
    monkeypatch.setattr(threads, "fastest", lambda _: 1)
    timed: list[int] = []

    def speed(*_: object) -> float:
        timed.append(torch.get_num_threads())
        return 1e9

    monkeypatch.setattr(memory_plan, "reached_speed", speed)
    rows = [{"prompt": "a question", "completion": "so " * (i + 1)} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"model={tiny.folder(tmp_path / 'model')}", "data=rows.jsonl"]
    if verb == "init":
        arguments.append("goal=instruct")
    else:
        arguments += ["runtime.device=cpu", f"data.cache={tmp_path / 'cache'}"]
    assert cli.main([verb, *arguments]) == 0
    assert set(timed) == {1}
    if verb == "plan":
        assert "of 1 to 2 threads 1 are fastest now" in capsys.readouterr().out
