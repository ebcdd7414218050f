"""A run that computes shared prefixes once is the run that computes them each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from safetensors.torch import load_file

import sftx
from sftx.types import UserError

QUESTION = "one question that is long enough to be shared, and has several answers: number "


def settings(tmp_path: Path, output: str, **sections: Any) -> dict[str, Any]:
    rows = [
        {"prompt": QUESTION + str(i // 4), "completion": tiny.WORDS[i % 11] * (i % 4 + 1)}
        for i in range(32)
    ]
    runtime = {"progress": False, "device": "cpu", "threads": 1, "report": False}
    runtime |= sections.pop("runtime", {})
    batch = {"examples_per_step": 8, "group_by": "prompt"} | sections.pop("batch", {})
    return {
        "model": tiny.folder(tmp_path / "model"),
        "data": {"rows": rows, "cache": str(tmp_path / "cache"), "workers": 0},
        "output": str(tmp_path / output),
        "batch": batch,
        "runtime": runtime,
        **sections,
    }


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sharing_changes_nothing_but_rounding(tmp_path: Path) -> None:
    """In packs that hold a step, and in packs over which each tree is split."""
    found = {}
    for name, runtime in (
        ("off", {"share_prefixes": "off"}),
        ("whole", {"share_prefixes": "on"}),
        ("split", {"tokens_per_pack": 150}),
    ):
        result = sftx.train(**settings(tmp_path, name, runtime=runtime))
        facts = json.loads((result.folder / "run.json").read_text())
        assert facts["shares_prefixes"] == (name != "off")
        said = any("shared prefixes are computed once" in note for note in facts["notes"])
        assert said == (name != "off")
        found[name] = lines_of(result.folder)
    for name in ("whole", "split"):
        for ours, theirs in zip(found[name], found["off"], strict=True):
            for key in ("loss", "grad_norm", "accuracy"):
                assert ours[key] == pytest.approx(theirs[key], rel=3e-6), (name, key)
            for key in ("tokens", "targets", "weight", "examples", "epoch"):
                assert ours[key] == theirs[key]
    assert found["split"][0]["packs"] > found["whole"][0]["packs"] == 1


def test_a_model_that_cannot_share_is_refused_only_where_it_must(tmp_path: Path) -> None:
    noise = {"neftune_alpha": 5.0}
    with pytest.raises(UserError, match=r"runtime.share_prefixes: on, but loss.neftune_alpha"):
        sftx.train(**settings(tmp_path, "on", loss=noise, runtime={"share_prefixes": "on"}))
    result = sftx.train(**settings(tmp_path, "auto", loss=noise, batch={"steps": 1}))
    facts = json.loads((result.folder / "run.json").read_text())
    assert not facts["shares_prefixes"]
    assert any("every example computes its own prefix" in note for note in facts["notes"])


@pytest.mark.slow
def test_two_ranks_that_share_train_as_one_that_does_not(tmp_path: Path) -> None:
    rows = [[QUESTION + str(i // 5), tiny.WORDS[i % 11] * (i % 4 + 1)] for i in range(40)]
    for name in ("rows", "held"):
        text = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    model = ranks.model(tmp_path / "model")
    found = {}
    for name, count, share in (("one", 0, "off"), ("two", 2, "on")):
        path = ranks.write_run(
            tmp_path,
            model,
            name,
            batch={"examples_per_step": 20, "epochs": 2, "group_by": "prompt"},
            runtime={"tokens_per_pack": 300, "share_prefixes": share},
        )
        ranks.run(path, count)
        assert ranks.facts(tmp_path / name)["shares_prefixes"] == (share == "on")
        found[name] = ranks.records(tmp_path / name)
    for ours, theirs in zip(found["two"], found["one"], strict=True):
        for key in ("loss", "grad_norm", "accuracy"):
            assert ours[key] == pytest.approx(theirs[key], rel=3e-6), key
        for key in ("tokens", "targets", "weight", "examples"):
            assert ours[key] == theirs[key]
    assert ranks.difference(tmp_path / "one", tmp_path / "two") < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("share", ["auto", "off"])
def test_a_killed_run_continues_to_the_bit(tmp_path: Path, share: str) -> None:
    """With sharing; and under `auto` where the run was begun without it."""
    begun = {"share_prefixes": share}
    extra: dict[str, Any] = {"checkpoint": {"every": 2}}
    whole = sftx.train(**settings(tmp_path, "whole", runtime=begun, **extra))
    for record in sftx.steps(**settings(tmp_path, "killed", runtime=begun, **extra)):
        if record.step == 3:
            break
    result = sftx.train(**settings(tmp_path, "killed", **extra))
    facts = json.loads((result.folder / "run.json").read_text())
    assert facts["shares_prefixes"] == (share == "auto")
    assert [line["loss"] for line in lines_of(result.folder)] == [
        line["loss"] for line in lines_of(whole.folder)
    ]
    ours, theirs = (load_file(r.folder / "model.safetensors") for r in (result, whole))
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.slow
def test_grouping_decides_the_result_and_sharing_does_not(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"checkpoint": {"every": 2}}
    for record in sftx.steps(**settings(tmp_path, "run", **extra)):
        if record.step == 3:
            break
    with pytest.raises(UserError, match=r"batch.group_by: 'prompt' in the run, 'none' now"):
        sftx.train(**settings(tmp_path, "run", batch={"group_by": "none"}, **extra))
    other = settings(tmp_path, "run", runtime={"share_prefixes": "off"}, **extra)
    assert len(lines_of(sftx.train(**other).folder)) == 4
