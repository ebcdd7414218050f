"""Checks 31 to 34: folders that two want, that a crash left, that a stranger made, or that are
damaged.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from crash import Recorder, put

import sftx
from scorecard.frame import check, expect, used
from scorecard.runs import (
    Child,
    die,
    digest,
    expect_equal,
    on_call,
    on_step,
    records,
    run,
    settings,
    write_config,
)
from sftx.cli import main
from sftx.training import checkpoint, loop

LONGEST = 120
"""Seconds until a command on a folder that is hostile or damaged is taken to hang."""


@check(31, "Two runs into one folder", limit=480)
def two_runs(folder: Path) -> str:
    """However close their starts: one trains as if it were alone, the other is refused and told who
    was first.

    An owner that was killed keeps nobody out.
    """
    whole = settings(folder, "whole")
    run(whole)
    delays = (0.0, 0.05, 0.2, 0.5, 1.0, 2.0)
    for delay in delays:
        config = settings(folder, f"run-{delay}")
        path = write_config(config)

        def train(path: str = path) -> int:
            on_call(loop, "train_step", lambda: time.sleep(0.3), calls=0)
            return main(["train", path])

        first = Child(train, folder / f"{delay}-first.log")
        time.sleep(delay)
        second = Child(train, folder / f"{delay}-second.log")
        codes = first.wait(), second.wait()
        expect(
            sorted(codes) == [0, 2],
            f"{delay} s apart: exit codes {codes}: {first.text[-200:]} {second.text[-200:]}",
        )
        owner, refused = (first, second) if codes[0] == 0 else (second, first)
        for part in (f"process {owner.pid}", platform.node(), "started", config["output"]):
            expect(
                part in refused.text,
                f"{delay} s apart: the refusal lacks {part!r}: {refused.text[-300:]}",
            )
        expect_equal(whole, config, f"the run that was first, {delay} s apart")
    killed = settings(folder, "killed")
    run(killed, on_step(8, die), code=-9)
    run(killed)
    expect_equal(whole, killed, "after an owner that was killed")
    return (
        f"{len(delays)} of {len(delays)} pairs: one run to the bit, one refused by host, "
        "process and start"
    )


@check(32, "Power loss at any moment", limit=1800)
def power_loss(folder: Path) -> str:
    """Stopped after any sync, rename or delete, without what was not synced: continued to the bit,
    no save lost.
    """
    disk = folder / "disk"
    disk.mkdir()
    config = settings(
        folder, batch={"steps": 4}, checkpoint={"every": 2, "keep": 1}, runtime={"progress": False}
    )
    config["output"] = str(disk / "runs" / "run")
    recorder = _recorded(disk, config)
    expected = records(config), digest(config)
    states = list(recorder.states())
    for where, promised, state in states:
        put(disk, state)
        taken = [record.step for record in sftx.steps(**config)]
        first = taken[0] if taken else 5
        expect(
            first > promised,
            f"{where}: step {promised} was saved, and the run began at step {first}",
        )
        expect(
            (records(config), digest(config)) == expected, f"{where}: the continued run is another"
        )
    return (
        f"{len(states)} of {len(states)} states after a crash continued to the bit, no "
        "finished save lost"
    )


def _recorded(disk: Path, config: dict[str, Any]) -> Recorder:
    """A run that dies after step 3 and continues to its end; what it was told to be saved is noted
    with each moment.
    """
    recorder = Recorder(disk)
    recorder.promised = 0
    with pytest.MonkeyPatch.context() as patch:
        save = checkpoint.save

        def saved(place: Path, state: checkpoint.State, *rest: Any, **options: Any) -> Path:
            path = save(place, state, *rest, **options)
            recorder.promised = state.step
            recorder.look()
            return path

        patch.setattr(checkpoint, "save", saved)
        recorder.watch(patch)
        for record in sftx.steps(**config):
            if record.step == 3:
                break
        sftx.train(**config)
        recorder.promised = 4  # finished: no step may be taken again
        recorder.look()
    return recorder


def leaves(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested objects stand; a list is one value."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


def replaced(path: Path, place: tuple[Any, ...], value: Any) -> None:
    """Put another value into a JSON file."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    inner = whole
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(whole), encoding="utf-8")


def command(arguments: list[str], log: Path) -> tuple[int, str]:
    """Exit code and output of an sftx command; `Failed` if it does not end."""
    child = Child(lambda: main(arguments), log)
    return child.wait(LONGEST), child.text


def booby_trapped(folder: Path, trace: Path) -> Path:
    """A model folder with code that leaves a trace where it is run."""
    evil = Path(tiny.folder(folder / "evil"))
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((evil / name).read_text())
        names = {
            "AutoConfig": "trap.C",
            "AutoModelForCausalLM": "trap.M",
            "AutoTokenizer": ["trap.T", None],
        }
        (evil / name).write_text(
            json.dumps({**told, "auto_map": names, "model_type": "trap", "tokenizer_class": "T"})
        )
    (evil / "trap.py").write_text(f"open({str(trace)!r}, 'w')\n")
    return evil


@check(33, "Hostile run folder", limit=1200)
def hostile_run(folder: Path) -> str:
    """Whatever run.json says of trust, models, adapters, templates and data: no code runs, no such
    file is opened.

    Every setting in it that is a text, or none, in turn names a model with code, and a pipe without
    an end.
    """
    trace, pipe = folder / "EXECUTED", folder / "pipe"
    os.mkfifo(pipe)
    names = str(booby_trapped(folder, trace)), str(pipe)
    tried = 0
    for adapter in ({}, {"adapter": {"method": "lora", "rank": 2}}):
        kind = "lora" if adapter else "full"
        config = settings(
            folder, kind, dropout=0.0, batch={"steps": 2}, checkpoint={"every": 1}, **adapter
        )
        run(config)
        recorded = json.loads((folder / kind / "run.json").read_text())["config"]
        for field, name in itertools.product(texts(recorded), names):
            copy = Path(shutil.copytree(folder / kind, folder / "copy"))
            replaced(copy / "run.json", ("config", "model", "trust_remote_code"), True)
            replaced(copy / "run.json", ("config", *field), name)
            for step in ([], ["step=1"]):
                code, said = command(
                    ["export", str(copy), f"to={folder / 'out'}", *step], folder / "export.log"
                )
                what = f"{kind}, {'.'.join(field)} = {Path(name).name} {step}"
                expect(
                    code in (0, 2) and "Traceback" not in said,
                    f"{what}: exit code {code}: {said[-300:]}",
                )
                expect(not trace.exists(), f"{what}: the code of a stranger's model was run")
                shutil.rmtree(folder / "out", ignore_errors=True)
                tried += 1
            shutil.rmtree(copy)
    return (
        f"{tried} exports of runs whose record names strangers: nothing executed, nothing "
        "waited for"
    )


def texts(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Where a text or nothing stands in nested objects."""
    for place in leaves(values):
        value: Any = values
        for key in place:
            value = value[key]
        if value is None or isinstance(value, str):
            yield place


ODD: tuple[Any, ...] = (None, "abc", -1, 0, 7, 1e300, [], {}, True)


def _mapped(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


HURTS: dict[str, Callable[[Path], Any]] = {
    "gone": Path.unlink,
    "empty": _mapped(lambda content: b""),
    "half": _mapped(lambda content: content[: len(content) // 2]),
    "NULs": _mapped(lambda content: bytes(len(content))),
    "a list": _mapped(lambda content: b"[]"),
    "deep": _mapped(lambda content: b"[" * 100_000 + b"]" * 100_000),
    "not UTF-8": _mapped(lambda content: b"\xff\xfe" + content),
    "first bytes": _mapped(lambda content: b"\xff" * 8 + content[8:]),
}


@check(34, "Damaged model folder", limit=1800)
def damaged_model(folder: Path) -> str:
    """Every file damaged in 8 ways, every value of its JSON in 9: it trains, or ends with one
    message and code 2.
    """
    config = settings(folder, dropout=0.0, batch={"steps": 1}, checkpoint={"every": 0})
    model = Path(config["model"]["path"])
    config["model"]["path"] = str(folder / "damaged")
    tried = trained = 0
    wrong: list[str] = []
    for what, damage in _damages(model):
        shutil.copytree(model, folder / "damaged")
        damage(folder / "damaged")
        before = used()
        code, said = command(["train", write_config(config)], folder / "damaged.log")
        seconds = used() - before
        if code not in (0, 2) or "Traceback" in said or seconds > 20:
            wrong.append(f"{what} (exit code {code}, {seconds:.0f} CPU-seconds)")
            print(f"{wrong[-1]}: {said.strip()[-300:]}", file=sys.stderr)
        shutil.rmtree(folder / "damaged")
        shutil.rmtree(config["output"], ignore_errors=True)
        tried, trained = tried + 1, trained + (code == 0)
    expect(not wrong, f"{len(wrong)} of {tried}: {'; '.join(wrong)}")
    return (
        f"{tried - trained} of {tried} damaged folders refused in one message, {trained} are "
        "harmless and train"
    )


def _damages(model: Path) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """(in words, what it does to a copy of the folder)."""
    files = sorted(path.name for path in model.iterdir())
    for name in files:
        for how, hurt in HURTS.items():
            yield f"{name} {how}", lambda copy, name=name, hurt=hurt: hurt(copy / name)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        for place in leaves(json.loads((model / name).read_text())):
            for value in ODD:
                what = f"{name}: {'.'.join(place)} = {value!r}"
                yield (
                    what,
                    lambda copy, name=name, place=place, value=value: replaced(
                        copy / name, place, value
                    ),
                )
