"""Links in the folders of strangers: nothing private is read into what is saved, and nothing is
written, cut or deleted outside of an output folder.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

import sftx
from sftx.cli import main

SECRET = "the key of the house"
ROWS = [["What is one plus one?", "It is 2."]] * 4


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A file of the user's that nobody asked for."""
    path = tmp_path / "private" / "secret"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "data": {"rows": ROWS, "cache": str(folder / "cache"), "workers": 0},
        "output": str(folder / "run"),
        "batch": {"steps": 1},
        "runtime": {"progress": False, "device": "cpu", "threads": 1, "tokens_per_pack": 512},
        **more,
    }


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
        "tokenizer.json",
    ],
)
def test_a_text_of_a_model_that_leads_out_is_not_read(
    name: str, tmp_path: Path, private: Path
) -> None:
    file = Path(tiny.folder(tmp_path / "model")) / name
    if name.endswith(".json"):
        given = json.loads(file.read_text()) if file.exists() else {}
        private.write_text(json.dumps({**given, "auths": SECRET}))
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(private)
    with pytest.raises(sftx.UserError, match=f"{file}: a link to {private}, outside of the folder"):
        sftx.train(**settings(tmp_path))
    assert not (tmp_path / "run").exists()
    made = tiny.folder(tmp_path / "other")
    if not name.endswith("config.json") or name.startswith("tokenizer"):
        given = {"path": made, "tokenizer": str(tmp_path / "model")}
        with pytest.raises(sftx.UserError, match="outside of the folder"):
            sftx.train(**settings(tmp_path, model=given))


def test_a_folder_of_texts_may_not_lead_out(tmp_path: Path, private: Path) -> None:
    model = Path(tiny.folder(tmp_path / "model"))
    (private.parent / "tool_use.jinja").write_text(SECRET)
    (model / "additional_chat_templates").symlink_to(private.parent)
    with pytest.raises(sftx.UserError, match="outside of the folder"):
        sftx.train(**settings(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_what_is_no_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    file = Path(tiny.folder(tmp_path / "model")) / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(sftx.UserError, match=f"{file}: not a file that can be read"):
        sftx.train(**settings(tmp_path))
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(sftx.UserError, match=f"{file}: not a file that can be read"):
        sftx.train(**settings(tmp_path))


def test_links_as_the_hub_and_people_make_them_work(tmp_path: Path) -> None:
    """The cache of the hub; a folder of links to another model; weights that lie elsewhere."""
    plain = Path(tiny.folder(tmp_path / "plain"))
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    linked, mixed = tmp_path / "linked", tmp_path / "mixed"
    for folder in (snapshot, blobs, linked):
        folder.mkdir(parents=True)
    shutil.copytree(plain, mixed)
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
        (linked / file.name).symlink_to(file)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (mixed / "model.safetensors").rename(elsewhere / "weights")
    (mixed / "model.safetensors").symlink_to(elsewhere / "weights")
    expected = None
    for number, folder in enumerate((plain, snapshot, linked, mixed)):
        run = settings(tmp_path, model=str(folder), output=str(tmp_path / f"run{number}"))
        result = sftx.train(**run)
        weights = (result.folder / "model.safetensors").read_bytes()
        assert not [path for path in result.folder.rglob("*") if path.is_symlink()]
        expected = expected or weights
        assert weights == expected


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "run.json",
        "run.json.tmp",
        ".owner.lock",
        ".owner.json.tmp",
        "dropped.jsonl",
        "model.safetensors",
        "README.md",
    ],
)
def test_a_run_does_not_write_through_a_link_in_its_folder(
    name: str, tmp_path: Path, private: Path
) -> None:
    tiny.folder(tmp_path / "model")
    config = settings(tmp_path)
    sftx.train(**config)
    file = tmp_path / "run" / name
    file.unlink(missing_ok=True)
    file.symlink_to(private)
    with pytest.raises(sftx.UserError, match=rf"output: {file} is a link to {private}, outside"):
        sftx.train(**{**config, "batch": {"steps": 2}})
    assert private.read_text() == SECRET


@pytest.mark.parametrize("name", ["checkpoints", ".model.tmp", "additional_chat_templates"])
def test_a_run_neither_writes_nor_deletes_in_a_folder_that_a_link_leads_to(
    name: str, tmp_path: Path, private: Path
) -> None:
    tiny.folder(tmp_path / "model")
    config = settings(tmp_path)
    sftx.train(**config)
    (private.parent / "step-00000001").mkdir()
    before = sorted(private.parent.rglob("*"))
    folder = tmp_path / "run" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.symlink_to(private.parent)
    with pytest.raises(sftx.UserError, match=rf"output: {folder} is a link"):
        sftx.train(**{**config, "checkpoint": {"every": 1}, "batch": {"steps": 2}})
    assert sorted(private.parent.rglob("*")) == before
    assert private.read_text() == SECRET


def test_the_output_itself_may_be_a_link(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model")
    (tmp_path / "big disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "big disk")
    sftx.train(**settings(tmp_path))
    assert (tmp_path / "big disk" / "model.safetensors").is_file()
    (tmp_path / "run" / "latest").symlink_to("model.safetensors")  # inside: nothing to refuse
    sftx.train(**settings(tmp_path))


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json.tmp"])
def test_a_link_made_while_a_run_writes_is_not_followed(
    name: str, tmp_path: Path, private: Path
) -> None:
    tiny.folder(tmp_path / "model")
    steps = sftx.steps(**settings(tmp_path, batch={"steps": 2}))
    next(steps)
    file = tmp_path / "run" / name
    file.unlink(missing_ok=True)
    file.symlink_to(private)
    with pytest.raises(OSError, match="symbolic link"):
        list(steps)
    assert private.read_text() == SECRET


def test_an_export_does_not_write_through_a_link(
    tmp_path: Path, private: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.folder(tmp_path / "model")
    sftx.train(**settings(tmp_path))
    for target in (private.parent, tmp_path / "nowhere"):
        (tmp_path / "run" / "exported").symlink_to(target)
        assert main(["export", str(tmp_path / "run")]) == 2
        assert "is not overwritten" in capsys.readouterr().err
        assert not (tmp_path / "nowhere").exists()
        (tmp_path / "run" / "exported").unlink()
    assert [path.name for path in private.parent.iterdir()] == ["secret"]
    (tmp_path / "run" / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "run" / "chat_template.jinja").symlink_to(private)
    assert main(["export", str(tmp_path / "run"), f"to={tmp_path / 'out'}"]) == 2
    assert "outside of the folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
