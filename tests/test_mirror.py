"""A run's copy elsewhere (`checkpoint.mirror`), and data that is read from elsewhere: the stores here
are fsspec's folder in memory and the disk.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
from fsspec.implementations.memory import MemoryFileSystem

import sftx
from sftx.training import checkpoint
from sftx.types import UserError

ROWS = [[f"What is {i} plus {i}?", f"It is {2 * i}."] for i in range(16)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(autouse=True)
def store() -> Iterator[MemoryFileSystem]:
    store = MemoryFileSystem()
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def sections(model: str, folder: Path, **checkpoint: Any) -> dict[str, Any]:
    return {
        "model": model,
        "data": {"rows": ROWS, "cache": str(folder.parent / "cache"), "workers": 0},
        "output": str(folder),
        "batch": {"examples_per_step": 4, "steps": 6},
        "checkpoint": {"every": 2, **checkpoint},
        "runtime": {"progress": False, "report": False, "device": "cpu", "threads": 1},
    }


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def stopped(model: str, folder: Path, after: int, **checkpoint: Any) -> None:
    """A run that is left after so many steps, whose own folder is lost."""
    steps = sftx.steps(**sections(model, folder, **checkpoint))
    for record in steps:
        if record.step == after:
            break
    steps.close()
    shutil.rmtree(folder)


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_lost_run_goes_on_from_its_mirror(
    model: str, tmp_path: Path, store: MemoryFileSystem, background: bool
) -> None:
    sftx.train(**sections(model, tmp_path / "whole"))
    url = "memory://bucket/runs/first"
    stopped(model, tmp_path / "lost", 5, mirror=url, background=background)
    assert [
        str(path)[-13:] for path in store.ls("/bucket/runs/first/checkpoints", detail=False)
    ] == [
        "step-00000002",
        "step-00000004",
    ]
    run = sftx.train(**sections(model, tmp_path / "lost", mirror=url))
    assert weights(tmp_path / "lost") == weights(tmp_path / "whole")
    started = json.loads((run.folder / "run.json").read_text())["started"]
    assert len(started) == 2
    records = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [1, 2, 3, 4, 5, 6]
    # At its end all of the run is there, but nothing of the process that owned it
    here = {p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.is_file()}
    there = {name.removeprefix("/bucket/runs/first/") for name in store.find("/bucket")}
    assert there == {name for name in here if not name.startswith(".owner")}
    assert store.cat_file("/bucket/runs/first/model.safetensors") == weights(run.folder)
    # Lost once more, the finished run comes back as it is
    shutil.rmtree(run.folder)
    sftx.train(**sections(model, tmp_path / "lost", mirror=url))
    assert weights(tmp_path / "lost") == weights(tmp_path / "whole")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_no_run_ends_while_its_folder_is_written(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    def seal_late(temporary: Path, final: Path, texts: dict[str, str]) -> None:
        time.sleep(1)
        seal(temporary, final, texts)

    seal = checkpoint._seal
    monkeypatch.setattr(checkpoint, "_seal", seal_late)
    steps = sftx.steps(**sections(model, tmp_path / "run", background=True))
    for record in steps:
        if record.step == 3:
            break
    # The owner's lock is gone with the run: what is written later is written into another's run
    if error is None:
        steps.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            steps._records.throw(error)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_a_damaged_copy_is_passed_over(
    model: str, tmp_path: Path, store: MemoryFileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "memory://bucket/damaged"
    stopped(model, tmp_path / "lost", 5, mirror=url)
    name = "/bucket/damaged/checkpoints/step-00000004/weights.safetensors"
    store.pipe_file(name, store.cat_file(name)[:-1] + b"x")
    steps = sftx.steps(**sections(model, tmp_path / "lost", mirror=url))
    assert next(steps).step == 3
    steps.close()
    assert "step-00000004 is not whole there; trying the one before" in capsys.readouterr().err


def test_a_lost_upload_is_said_once_and_sent_again(
    model: str,
    tmp_path: Path,
    store: MemoryFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, refused = MemoryFileSystem.put_file, []

    def put_file(self: MemoryFileSystem, here: str, there: str, **more: Any) -> None:
        if len(refused) < 2 and there.endswith(".safetensors"):
            refused.append(there)
            raise PermissionError("the store says no")
        own(self, here, there, **more)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    folder, url = tmp_path / "run", "memory://bucket/late"
    sftx.train(**sections(model, folder, mirror=url))
    said = [line for line in capsys.readouterr().err.splitlines() if "the store says no" in line]
    assert len(refused) == 2
    assert len(said) == 1
    assert "the run's own folder is whole; sent again with the next checkpoint" in said[0]
    assert store.cat_file("/bucket/late/model.safetensors") == weights(folder)
    assert len(store.ls("/bucket/late/checkpoints")) == 2

    def never(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(MemoryFileSystem, "put_file", never)
    sftx.train(**sections(model, tmp_path / "alone", mirror="memory://bucket/never"))
    said = capsys.readouterr().err
    assert said.count("no network") == 1
    assert "memory://bucket/never lacks the end of this run" in said
    assert weights(tmp_path / "alone") == weights(folder)


@pytest.mark.slow
def test_a_folder_of_the_disk_and_what_cannot_be_opened(model: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/mirror"
    sftx.train(**sections(model, tmp_path / "run", mirror=url))
    assert weights(tmp_path / "mirror") == weights(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoint\.mirror: gibberish://x cannot be opened"):
        sftx.train(**sections(model, tmp_path / "other", mirror="gibberish://x"))
    assert not (tmp_path / "other").exists()


def test_rows_are_read_from_a_url(
    model: str, tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "\n".join(map(json.dumps, ROWS))
    store.pipe_file("/bucket/rows/a.jsonl", lines.encode())
    store.pipe_file("/bucket/rows/b.jsonl", b'["One?", 1]\n')
    given = sections(model, tmp_path / "run")
    del given["data"]["rows"]
    given["data"]["train"] = "memory://bucket/rows/a.jsonl"
    sftx.train(**sections(model, tmp_path / "local"))
    sftx.train(**given)
    assert weights(tmp_path / "run") == weights(tmp_path / "local")
    # A second run does not fetch it again
    monkeypatch.setattr(MemoryFileSystem, "get_file", None)
    given["output"] = str(tmp_path / "again")
    sftx.train(**given)
    monkeypatch.undo()
    given["output"] = str(tmp_path / "refused")
    given["data"]["train"] = "memory://bucket/rows/*.jsonl"
    with pytest.raises(UserError, match=r"memory://.*/bucket/rows/b\.jsonl:1"):
        sftx.train(**given)
    given["data"]["train"] = "memory://bucket/none.jsonl"
    with pytest.raises(UserError, match=r"memory://bucket/none\.jsonl: there is no such file"):
        sftx.train(**given)


LEFT = """
import sys
import sftx
from sftx.settings.load import load_config

for record in sftx.steps(load_config(sys.argv[1])):
    if record.step == 12:
        break
"""


@pytest.mark.long
def test_two_ranks_with_an_empty_folder_go_on_from_the_mirror(tmp_path: Path) -> None:
    model = ranks.model(tmp_path / "model")
    program = tmp_path / "left.py"
    program.write_text(LEFT, encoding="utf-8")
    mirror = {"every": 5, "mirror": f"file://{tmp_path}/mirror"}
    runtime = {"parallel": "fsdp"}
    ranks.run(ranks.write_run(tmp_path, model, "whole", runtime=runtime), 2)
    path = ranks.write_run(tmp_path, model, "lost", runtime=runtime, checkpoint=mirror)
    ranks.run(path, 2, program=[str(program)])
    shutil.rmtree(tmp_path / "lost")
    said = ranks.run(path, 2)
    assert said.count("the run was brought here from file://") == 1
    assert [record["step"] for record in ranks.records(tmp_path / "lost")] == [*range(1, 21)]
    assert weights(tmp_path / "lost") == weights(tmp_path / "whole")
    assert weights(tmp_path / "mirror") == weights(tmp_path / "lost")
