"""One run owns an output folder: who comes second is refused, and dead owners keep nobody out."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks
import tiny

import sftx
from sftx.report import lock
from sftx.report.lock import LOCK, OWNER, owned

HOLD = """
import sys, time
from pathlib import Path
from sftx.report.lock import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_run_is_refused_before_it_encodes_and_told_who_was_first(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    began = time.strftime("%Y-%m-%d %H:")
    with pytest.raises(sftx.UserError) as refused:
        sftx.train(model="no/such/model", data=["a text"], output=str(tmp_path / "run"))
    for part in (
        str(tmp_path / "run"),
        f"process {holder.pid}",
        platform.node(),
        f"started {began}",
    ):
        assert part in str(refused.value)


def test_the_lock_of_a_process_that_was_killed_is_taken_over_at_once(
    tmp_path: Path, holder: subprocess.Popen[str], capfd: pytest.CaptureFixture[str]
) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / OWNER).exists()
    began = time.monotonic()
    with owned(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / OWNER).read_text())["process"] == os.getpid()
    assert time.monotonic() - began < lock.PATIENCE / 2
    assert capfd.readouterr().err == ""


def test_a_run_that_its_caller_left_open_is_named_as_this_very_process(tmp_path: Path) -> None:
    with (
        owned(tmp_path / "run"),
        pytest.raises(sftx.UserError, match=rf"process {os.getpid()} .*this very process"),
        owned(tmp_path / "run"),
    ):
        pass
    with owned(tmp_path / "run"):
        pass


def test_a_folder_is_free_again_and_gone_if_nothing_was_written(tmp_path: Path) -> None:
    with owned(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / LOCK).exists()
    assert not (tmp_path / "new" / "run").exists()
    with owned(tmp_path / "run"):
        (tmp_path / "run" / "run.json").write_text("{}")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", LOCK}


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.3)


def elsewhere(folder: Path, **changes: str) -> Path:
    """The trace of an owner on another machine, whose lock does not reach this one."""
    folder.mkdir()
    owner = {
        "host": "node-17",
        "boot": "another",
        "process": 4711,
        "started": "2026-01-01 10:00:00 +0000",
        **changes,
    }
    (folder / OWNER).write_text(json.dumps(owner))
    return folder / OWNER


def test_an_owner_on_another_machine_that_still_renews_its_mark_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    mark = elsewhere(tmp_path / "run")
    # Between two looks.
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(mark))
    with (
        pytest.raises(sftx.UserError, match=r"process 4711 on node-17, started 2026-01-01"),
        owned(tmp_path / "run"),
    ):
        pass
    assert "node-17" in capfd.readouterr().err
    assert json.loads(mark.read_text())["process"] == 4711  # it is still the other's


@pytest.mark.parametrize("host", ["node-17", platform.node()])
def test_an_owner_on_another_machine_that_is_silent_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """An equal host name does not make it the same machine: nodes may share one, and this may be
    after a reboot.
    """
    quick(monkeypatch)
    mark = elsewhere(tmp_path / "run", host=host)
    began = time.monotonic()
    with owned(tmp_path / "run"):
        assert time.monotonic() - began >= 0.3
        assert json.loads(mark.read_text())["process"] == os.getpid()


def test_an_owner_renews_its_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    with owned(tmp_path / "run"):
        first = (tmp_path / "run" / OWNER).stat().st_mtime_ns
        end = time.monotonic() + 60
        while (tmp_path / "run" / OWNER).stat().st_mtime_ns == first:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize("trace", ["", "{", "[1]", "\0" * 20])
def test_a_damaged_mark_keeps_nobody_out(tmp_path: Path, trace: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / OWNER).write_text(trace)
    with owned(tmp_path / "run"):
        pass


@pytest.mark.slow
def test_runs_started_together_leave_one_owner_and_one_record(tmp_path: Path) -> None:
    """Starts 0 to 0.6 s apart, as a user's two terminals or a scheduler's requeue make them."""
    path = ranks.write_run(tmp_path, tiny.folder(tmp_path / "model"), "run", batch={"epochs": 20})
    started = []
    for _ in range(3):
        started.append(ranks.start(path, 0))
        time.sleep(0.3)
    outputs = [process.communicate(timeout=120)[0] for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 2, 2], outputs
    winner = started[codes.index(0)].pid
    for code, output in zip(codes, outputs, strict=True):
        assert (f"process {winner} on" in output) == (code == 2)
    steps = [line["step"] for line in ranks.records(tmp_path / "run")]
    assert steps == list(range(1, ranks.facts(tmp_path / "run")["num_steps"] + 1))


@pytest.mark.slow
def test_two_jobs_of_two_ranks_do_not_share_a_folder(tmp_path: Path) -> None:
    path = ranks.write_run(tmp_path, tiny.folder(tmp_path / "model"), "run", batch={"epochs": 60})
    first = ranks.start(path, 2)
    while not (tmp_path / "run" / OWNER).exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = ranks.start(path, 2)
    output, _ = second.communicate(timeout=120)
    assert second.returncode != 0
    assert "is owned by another run" in output
    rest, _ = first.communicate(timeout=120)
    assert first.returncode == 0, rest
    assert not (tmp_path / "run" / OWNER).exists()
