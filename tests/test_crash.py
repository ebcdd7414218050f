"""A crash or a power loss at any moment of a run: it continues to the bit, from the last state that
was saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from crash import Recorder, put

import sftx
from sftx.training import checkpoint, memory_plan
from sftx.training.export import export

ROWS = [[f"What is {i} plus one?", f"It is {i + 1}."] for i in range(13)]
TIMES = {"seconds", "seconds_left", "tokens_per_second", "memory"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, and room for a disk."""
    tiny.folder(tmp_path / "model")
    return tmp_path


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run here needs its memory predicted, which takes most of its time."""
    monkeypatch.setattr(memory_plan, "predict", unpredictable)


def unpredictable(*_: Any) -> None:
    raise RuntimeError("not predicted")


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Six steps, saved after the second and the fourth; one row is dropped, some are held out."""
    return {
        "model": str(folder / "model"),
        "data": {
            "rows": [*ROWS, ["a"]],
            "on_bad_row": "skip",
            "eval_split": 0.2,
            "cache": str(folder / "cache"),
            "workers": 0,
        },
        "output": str(folder / "disk" / "runs" / "run"),
        "batch": {"examples_per_step": 4, "steps": 6},
        "optim": {"learning_rate": 3e-3},
        "checkpoint": {"every": 2, "keep": 1},
        "runtime": {"progress": False, "device": "cpu", "threads": 1, "tokens_per_pack": 512},
        **changes,
    }


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves, without what a clock or a meter says."""
    facts = json.loads((run / "run.json").read_text())
    weights = next(run.glob("*model.safetensors"))
    return {
        "weights": weights.read_bytes(),
        "metrics": [
            {key: value for key, value in json.loads(line).items() if key not in TIMES}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ],
        "facts": {
            key: facts[key]
            for key in ("status", "eval_before", "eval_after", "total_tokens", "total_targets")
        },
        "ledger": (run / "ledger.json").read_bytes(),
        "dropped": (run / "dropped.jsonl").read_bytes(),
        "left over": sorted(path.name for path in run.rglob("*.tmp")),
    }


def record(folder: Path, config: dict[str, Any], **disk: Any) -> Recorder:
    """A run that is killed after its third step and then continued to its end."""
    root = folder / "disk"
    root.mkdir(exist_ok=True)
    recorder = Recorder(root, **disk)
    recorder.promised = 0
    seal = checkpoint._seal

    def sealed(temporary: Path, final: Path, *rest: Any) -> None:
        seal(temporary, final, *rest)
        recorder.promised = int(final.name.removeprefix("step-"))
        recorder.look()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_seal", sealed)
        recorder.watch(patch)
        for step in sftx.steps(**config):
            if step.step == 3:
                break
        sftx.train(**config)
        recorder.promised = "finished"
        recorder.look()
    return recorder


def lost(
    state: dict[Path, bytes | None], promised: Any, config: dict[str, Any], expected: dict[str, Any]
) -> list[str]:
    """What is wrong once the run is continued from `state`."""
    run = Path(config["output"])
    put(run.parents[1], state)
    try:
        taken = [record.step for record in sftx.steps(**config)]
    except sftx.UserError as error:
        return [f"was refused: {error}"]
    found = outcome(run)
    wrong = [name for name, value in expected.items() if found[name] != value]
    if promised == "finished" and taken:
        wrong.append(f"was finished, and took steps {taken}")
    if promised != "finished" and taken and taken[0] <= promised:
        wrong.append(f"began at step {taken[0]}, though step {promised} was saved")
    return wrong


def failures(folder: Path, config: dict[str, Any], share: slice, **disk: Any) -> Iterator[str]:
    """The states, of the `share` of all that is tried, from which the run does not continue as it
    should.
    """
    recorder = record(folder, config, **disk)
    expected = outcome(Path(config["output"]))
    for where, promised, state in list(recorder.states())[share]:
        if wrong := lost(state, promised, config, expected):
            yield f"{where}, promised {promised}: {', '.join(wrong)}"


def test_what_a_run_calls_saved_is_there_after_a_power_loss(folder: Path) -> None:
    """The disk has only what was synced: right after each save, and after the end."""
    config = settings(folder)
    recorder = record(folder, config)
    expected = outcome(Path(config["output"]))
    first: dict[Any, dict[Path, bytes | None]] = {}
    for how, promised, state in recorder.states():
        if how.endswith("only what was synced"):
            first.setdefault(promised, state)
    assert [*first] == [0, 2, 4, "finished"]
    for promised in (4, "finished"):
        assert not lost(first[promised], promised, config, expected)


@pytest.mark.parametrize("method", ["none", "lora"])
def test_what_an_export_wrote_is_there_after_a_power_loss(folder: Path, method: str) -> None:
    """At any moment there is nothing under its name or the whole model; in the end the model."""
    config = settings(folder, output=str(folder / "run"), batch={"steps": 1})
    if method == "lora":
        config["adapter"] = {"method": "lora", "rank": 2}
    sftx.train(**config)
    root, target = folder / "disk", Path("made/out")
    root.mkdir()
    recorder = Recorder(root)
    with pytest.MonkeyPatch.context() as patch:
        recorder.watch(patch)
        export(folder / "run", root / target)
        recorder.look()
        recorder.promised = "exported"
        recorder.look()
    whole = {path.relative_to(root): path.read_bytes() for path in (root / target).glob("*.*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in whole}
    states = list(recorder.states())
    assert len(states) > 20
    for where, promised, state in states:
        assert promised is None or target in state, where
        if target in state:
            found = {path: state.get(path) for path in whole}
            assert found == whole, where


SHARES = {
    "plain": slice(2, None, 6),
    "background": slice(0, None, 8),
    "lora": slice(1, None, 8),
    "every state": slice(None),
}
"""Which of some 260 states of the disk are tried; each takes about a second."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["plain", "background", "lora", pytest.param("every state", marks=pytest.mark.long)]
)
def test_a_run_continues_to_the_bit_from_any_crash(folder: Path, how: str) -> None:
    config = settings(folder)
    if how == "background":
        config["checkpoint"]["background"] = True
    if how == "lora":
        config["adapter"] = {"method": "lora", "rank": 2, "dropout": 0.2}
    whole = {**config, "output": str(folder / "whole")}
    sftx.train(**whole)
    wrong = [*failures(folder, config, SHARES[how])]
    assert not wrong, "\n".join(wrong)
    assert outcome(folder / "whole") == outcome(Path(config["output"]))


@pytest.mark.slow
@pytest.mark.parametrize("syncs", [(), ("files",), ("folders",)])
def test_a_disk_that_does_not_honour_syncs_is_found_out(
    folder: Path, syncs: tuple[str, ...]
) -> None:
    """The check above can fail: a run that synced nothing, or only files, or only folders, would
    lose what it saved.
    """
    assert next(failures(folder, settings(folder), slice(None, None, -1), syncs=syncs), None)
