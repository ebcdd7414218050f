"""The copy of a run and its data on S3, against a server of moto on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny

import sftx

server = pytest.importorskip("moto.server", reason="needs moto[server]")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
pytestmark = pytest.mark.long
ROWS = "".join(json.dumps([f"What is {i} plus {i}?", f"It is {2 * i}."]) + "\n" for i in range(16))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The store with an empty bucket, as s3fs sees it."""
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setitem(ranks.ENVIRONMENT, name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.makedirs("bucket", exist_ok=True)
    yield files
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


def sections(folder: Path, model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "data": {"train": "s3://bucket/rows/*.jsonl", "cache": str(folder.parent / "cache")},
        "output": str(folder),
        "batch": {"examples_per_step": 4, "steps": 6},
        "checkpoint": {"every": 2, **more},
        "runtime": {"progress": False, "report": False, "device": "cpu", "threads": 1},
    }


def test_a_run_reads_from_s3_and_goes_on_from_its_copy_there(tmp_path: Path, store: Any) -> None:
    model = tiny.folder(tmp_path / "model")
    store.pipe_file("bucket/rows/a.jsonl", ROWS.encode())
    sftx.train(**sections(tmp_path / "whole", model))
    url = "s3://bucket/runs/first"
    steps = sftx.steps(**sections(tmp_path / "lost", model, mirror=url))
    for record in steps:
        if record.step == 5:
            break
    steps.close()
    shutil.rmtree(tmp_path / "lost")
    names = {Path(name).name for name in store.ls("bucket/runs/first/checkpoints", refresh=True)}
    assert names == {"step-00000002", "step-00000004"}
    sftx.train(**sections(tmp_path / "lost", model, mirror=url))
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("lost", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    store.invalidate_cache()
    assert store.cat_file("bucket/runs/first/model.safetensors") == theirs.read_bytes()
    here = {p.relative_to(ours.parent).as_posix() for p in ours.parent.rglob("*") if p.is_file()}
    there = {name.removeprefix("bucket/runs/first/") for name in store.find("bucket/runs/first")}
    assert there == {name for name in here if not name.startswith(".owner")}
    assert len(ranks.records(ours.parent)) == 6


def test_a_store_that_says_no_takes_nothing_from_the_run(
    tmp_path: Path, store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.folder(tmp_path / "model")
    store.pipe_file("bucket/rows/a.jsonl", ROWS.encode())
    sftx.train(**sections(tmp_path / "whole", model))
    sftx.train(**sections(tmp_path / "run", model, mirror="s3://No Bucket/run", resume="never"))
    said = capsys.readouterr().err
    assert "checkpoint.mirror: s3://No Bucket/run" in said
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
