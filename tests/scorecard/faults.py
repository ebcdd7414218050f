"""Checks 11 to 14, 19 and 20: what a run does when it is killed, told to stop, out of space, or
handed bad numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file

from scorecard.frame import check, expect
from scorecard.runs import (
    Child,
    checkpoints,
    die,
    digest,
    expect_equal,
    facts,
    on_call,
    on_step,
    records,
    run,
    settings,
    write_rows,
)
from sftx import cli
from sftx.model.pack_loss import PackLoss
from sftx.training import build, checkpoint, finish, job, loop


@check(11, "50 x SIGKILL inside a save", limit=600)
def kills(folder: Path) -> str:
    """50 kills at random moments of a save: every run continues unaided, to the bit, at most one
    save behind.
    """
    steps: dict[str, Any] = {"batch": {"steps": 6}, "checkpoint": {"every": 2}}
    whole = settings(folder, "whole", **steps)
    took = folder / "took"

    def timed() -> None:
        on_call(checkpoint, "save", around=lambda save: _timed(save, took))

    run(whole, timed)
    seconds, rng = min(map(float, took.read_text().split())), random.Random(0)
    inside = trials = 0
    while inside < 50 and trials < 150:
        config = settings(folder, f"run-{trials}", **steps)
        delay = rng.random() * seconds
        run(
            config,
            lambda delay=delay: on_call(checkpoint, "save", lambda: _kill_after(delay), calls=2),
            code=None,
        )
        left = checkpoints(config)
        expect("step-00000002" in left, f"kill {trials}: only {left} left of a save before")
        hit = "step-00000004" not in left
        inside, trials, seconds = inside + hit, trials + 1, seconds * (1.05 if hit else 0.9)
        run(config)
        expect_equal(whole, config, f"the run after kill {trials}")
        expect(
            not [name for name in checkpoints(config) if name.endswith(".tmp")],
            f"debris: {checkpoints(config)}",
        )
        shutil.rmtree(config["output"])
    expect(inside == 50, f"only {inside} of {trials} kills hit the save")
    return (
        f"50 of 50 continued to the bit, and so did {trials - 50} that were killed right after "
        "a save"
    )


def _timed(save: Callable[..., Any], took: Path) -> Callable[..., Any]:
    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        result = save(*args, **kwargs)
        with took.open("a") as file:
            file.write(f"{time.monotonic() - began}\n")
        return result

    return measured


def _kill_after(seconds: float) -> None:
    """SIGKILL this process from another one, later."""
    mine = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(mine, signal.SIGKILL)
        os._exit(0)


@check(12, "Corruption matrix", limit=240)
def corruption(folder: Path) -> str:
    """Every file of the newest checkpoint deleted, halved, flipped, emptied: one warning, the one
    before is taken.
    """
    whole, killed = settings(folder, "whole"), settings(folder, "killed")
    run(whole)
    run(killed, on_step(8, die), code=-9)
    newest = "step-00000006"
    names = sorted(path.name for path in (folder / "killed" / "checkpoints" / newest).iterdir())
    expect(len(names) >= 4, f"files of a checkpoint: {names}")

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(len(content) * 0.6)] ^= 0x40
        path.write_bytes(content)

    hurts: dict[str, Callable[[Path], Any]] = {
        "delete": Path.unlink,
        "halve": lambda path: os.truncate(path, path.stat().st_size // 2),
        "flip": flip,
        "empty": lambda path: os.truncate(path, 0),
    }
    for name in names:
        for how, hurt in hurts.items():
            config = settings(folder, "damaged")
            shutil.rmtree(config["output"], ignore_errors=True)
            shutil.copytree(killed["output"], config["output"])
            hurt(folder / "damaged" / "checkpoints" / newest / name)
            text = run(config)
            expect(
                "after step 3" in text,
                f"{how} {name}: not continued from the checkpoint before: {text[-300:]}",
            )
            expect(
                text.count("warning: checkpoint") == 1,
                f"{how} {name}: {text.count('warning: checkpoint')} warnings",
            )
            expect_equal(whole, config, f"{how} {name}")
    return (
        f"{len(names) * len(hurts)} of {len(names) * len(hurts)} cells fall back with one "
        "warning, to the bit"
    )


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """Inside, `path` is a file system of `size` bytes that this process and its children see."""
    libc = ctypes.CDLL(None, use_errno=True)
    path.mkdir()
    identity = os.getuid(), os.getgid()
    if (
        libc.unshare(0x00020000) != 0
    ):  # CLONE_NEWNS; without the right to it, in a user namespace of our own
        expect(
            libc.unshare(0x10000000 | 0x00020000) == 0,
            "no file system can be mounted here: not tested",
        )
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {identity[0]} 1"),
            ("gid_map", f"0 {identity[1]} 1"),
        ):
            Path("/proc/self", name).write_text(line)
    private, recursive = 1 << 18, 1 << 14
    libc.mount(None, b"/", None, private | recursive, None)
    mounted = libc.mount(b"tmpfs", bytes(path), b"tmpfs", 0, f"size={size}".encode())
    expect(
        mounted == 0,
        f"no file system can be mounted here ({os.strerror(ctypes.get_errno())}): not tested",
    )
    try:
        yield
    finally:
        libc.umount2(bytes(path), 2)  # detached: an open file does not hold it


@check(13, "Disk full", limit=120)
def disk_full(folder: Path) -> str:
    """Refused before writing, with path, needed and free; a disk that fills up while writing harms
    nothing either.
    """
    disk = folder / "disk"
    whole = settings(folder, "whole")
    run(whole)
    told = []
    with small_disk(disk, 3 << 20):
        for case in ("before", "while writing", "the model"):
            config = {**settings(folder), "output": str(disk / "run")}

            def fill(case: str = case) -> None:
                def leave(size: int) -> None:
                    (disk / "ballast").write_bytes(b"\0" * (shutil.disk_usage(disk).free - size))

                if case == "the model":
                    on_call(finish, "save_model", lambda: leave(50_000))
                else:
                    on_call(checkpoint, "save", lambda: leave(200_000), calls=2)
                if case == "while writing":
                    on_call(checkpoint, "_shortage", around=lambda _: lambda *args: "")

            text = run(config, fill, code=2)
            told.append(text.strip().rpartition("\n")[2])
            expect("Traceback" not in text and str(disk) in told[-1], f"{case}: {text[-300:]}")
            numbers = case == "the model" or ("needed" in told[-1] and "free" in told[-1])
            expect(numbers, f"{case}: needed and free are not named: {told[-1]}")
            left = ["step-00000006", "step-00000009"] if case == "the model" else ["step-00000003"]
            expect(
                checkpoints(config) == left, f"{case}: left in the folder: {checkpoints(config)}"
            )
            expect(
                not list((disk / "run").glob(".model*")), f"{case}: a half-written model was left"
            )
            (disk / "ballast").unlink()
            run(config)
            expect_equal(whole, config, case)
            shutil.rmtree(config["output"])
    why = told[0].partition("checkpoints: ")[2].partition(". ")[0]
    return f"{len(told)} of {len(told)} refused, no debris, continued to the bit: {why}"


@check(14, "SIGTERM / SIGUSR1, 1 process", limit=150)
def stop(folder: Path) -> str:
    """In preparation, a step, an evaluation and a save: exit code 75 (not 0), and the run continues
    to the bit.

    SIGINT does the same in a step; a second one, there or inside a save, quits at once and harms
    nothing.
    """
    more = {
        "data": {"eval": write_rows(folder / "held.jsonl", tiny.pairs(9))},
        "eval": {"every": 3},
    }
    whole = settings(folder, "whole", **more)
    run(whole)
    points: dict[str, Callable[[Callable[[], None]], Any]] = {
        "preparation": lambda act: on_call(build, "load_model", act),
        "first evaluation": lambda act: on_call(job, "held_out_loss", act),
        "step": lambda act: on_step(5, act)(),
        "evaluation": lambda act: on_call(job, "held_out_loss", act, calls=3),
        "save": lambda act: on_call(checkpoint, "sync", act, calls=2),
        "last evaluation": lambda act: on_call(job, "held_out_loss", act, calls=5),
    }
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for point, plant in points.items():
            config = settings(folder, f"{point} {number}", **more)
            text = run(
                config,
                lambda plant=plant, number=number: plant(lambda: os.kill(os.getpid(), number)),
                code=75,
            )
            early = point in ("preparation", "first evaluation")
            expect(("nothing to save" in text) == early, f"{point}: {text[-200:]}")
            before = checkpoints(config)
            expect(early != bool(before), f"{point}: checkpoints {before}")
            run(config)
            expect_equal(whole, config, point)
            expect(
                facts(config)["eval_before"] == facts(whole)["eval_before"],
                f"{point}: evaluation before lost",
            )
            expect(
                facts(config)["eval_after"] == facts(whole)["eval_after"],
                f"{point}: evaluation after differs",
            )
            if point == "step":
                expect("step-00000005" in before, f"a signal in step 5 was followed by {before}")
    once = settings(folder, "once", **more)
    run(once, on_step(5, lambda: os.kill(os.getpid(), signal.SIGINT)), code=75)
    run(once)
    expect_equal(whole, once, "after SIGINT")
    for point, plant in (
        ("step", points["step"]),
        ("save", lambda act: on_call(checkpoint, "sync", act, calls=9)),
    ):
        twice = settings(folder, f"twice {point}", **more)
        run(twice, lambda plant=plant: plant(_interrupt_twice), code=130)
        expect(
            checkpoints(twice)[0] == "step-00000003", f"a second SIGINT left {checkpoints(twice)}"
        )
        run(twice)
        expect_equal(whole, twice, f"after a second SIGINT in a {point}")
    number = 2 * len(points) + 1
    return (
        f"{number} of {number} exit with 75 and continue to the bit; a second SIGINT quits at "
        "once, in a save too"
    )


def _interrupt_twice() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


POISONS: dict[str, Callable[..., torch.Tensor]] = {
    "nan": lambda loss, _: loss * float("nan"),
    "inf": lambda loss, _: loss + float("inf"),
    "gradient": lambda loss, weight: (
        loss + (weight.sum() * 0).sqrt()
    ),  # a finite loss with an infinite slope
}


def _poison(*steps: int, kind: str = "nan") -> Callable[[], None]:
    """A `before`: the loss of these steps (counted from 1 in this process), or its gradient, is not
    finite.
    """

    def plant() -> None:
        original, count = loop.train_step, 0

        def train_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            forward = PackLoss.forward
            if count in steps:
                PackLoss.forward = lambda self, pack, tally=None: POISONS[kind](
                    forward(self, pack, tally), next(self.parameters())
                )
            try:
                return original(*args, **kwargs)
            finally:
                PackLoss.forward = forward

        loop.train_step = train_step

    return plant


@check(19, "NaN / inf", limit=90, quick=True)
def not_finite(folder: Path) -> str:
    """Never applied, never logged as a number, its rows named; after `max_bad_steps` the run stops
    with code 3.
    """
    ever = settings(folder, "ever", optim={"max_bad_steps": 2})
    for kind in POISONS:
        once = settings(folder, kind)
        run(once, _poison(5, kind=kind))
        lines = records(once)
        expect(
            [line["step"] for line in lines if line["loss"] is None] == [5],
            f"{kind}: step 5 alone has no loss",
        )
        numbers = [line["loss"] for line in lines if line["loss"] is not None]
        expect(
            all(0 < loss < float("inf") for loss in numbers), f"{kind}: losses recorded: {numbers}"
        )
    # Skipped in full: what AdamW remembers of the steps is as if this one had never been either.
    expect(
        len({digest(settings(folder, kind)) for kind in POISONS}) == 1,
        "a step that is not finite left a trace",
    )
    run(ever, _poison(*range(5, 99)), code=3)
    text = (folder / "ever.log").read_text()
    expect("last good checkpoint: step 6" in " ".join(text.split()), text[-300:])
    bad = [
        json.loads(line) for line in (folder / "ever" / "bad_steps.jsonl").read_text().splitlines()
    ]
    expect(
        [line["step"] for line in bad] == [5, 6, 7],
        f"bad steps recorded: {[line['step'] for line in bad]}",
    )
    saved = [load_file(path) for path in folder.rglob("*.safetensors") if "cache" not in path.parts]
    expect(
        all(torch.isfinite(tensor).all() for tensors in saved for tensor in tensors.values()),
        "NaN was saved",
    )
    shown = folder / "shown.json"
    asked = ["inspect", str(folder / "nan.yaml"), "step=5", f"json={shown}"]
    child = Child(lambda: cli.main(asked), folder / "inspect.log")
    expect(child.wait() == 0, child.text[-300:])
    rows = [view["place"].partition(": ")[2] for view in json.loads(shown.read_text())]
    named = json.loads((folder / "nan" / "bad_steps.jsonl").read_text())["rows"]
    expect(
        sorted(rows) == sorted(named), f"inspect step=5 shows {rows[:2]}, the run named {named[:2]}"
    )
    return (
        f"{', '.join(POISONS)}: all {len(saved)} saved files finite, code 3 after 3 bad steps, "
        "rows named and shown"
    )


@check(20, "Retention and async", limit=120)
def retention(folder: Path) -> str:
    """The newest good checkpoints and the best stay, damaged ones do not count; saving on a thread
    is as exact.

    An error in it ends the run one step later, and weights that change after the save do not leak
    in.
    """
    held = {"data": {"eval": write_rows(folder / "held.jsonl", tiny.pairs(9))}}
    steps: dict[str, Any] = {
        "batch": {"steps": 20},
        "eval": {"every": 1},
        "optim": {"learning_rate": 0.1},
    }
    for keep in (1, 2, 3):
        config = settings(
            folder, f"keep-{keep}", **held, **steps, checkpoint={"every": 1, "keep": keep}
        )
        run(config, on_step(19, lambda: os.kill(os.getpid(), signal.SIGTERM)), code=75)
        scores = {line["step"]: line["eval"]["loss"] for line in records(config) if line["eval"]}
        best = min((loss, step) for step, loss in scores.items())[1]
        kept = sorted({best, *range(20 - keep, 20)})
        found = [int(name.removeprefix("step-")) for name in checkpoints(config)]
        expect(found == kept, f"keep {keep}: steps {found} were kept, not {kept}")
    hurt = settings(folder, "hurt", checkpoint={"every": 1, "keep": 2})

    def hurt_one() -> None:  # of those that step 10 would leave, the last is damaged
        os.truncate(
            Path(hurt["output"]) / "checkpoints" / "step-00000009" / "optimizer.safetensors", 10
        )

    run(hurt, lambda: [on_step(10, hurt_one)(), on_step(11, die)()], code=-9)
    expect(
        checkpoints(hurt) == ["step-00000008", "step-00000010"],
        f"beside a damaged one: {checkpoints(hurt)}",
    )
    whole, apart = (
        settings(folder, "whole"),
        settings(folder, "apart", checkpoint={"every": 2, "background": True}),
    )
    run(whole)

    def slowly() -> None:  # every save takes longer than a step, so training runs ahead of it
        on_call(checkpoint, "_write", lambda: time.sleep(0.2), calls=0)

    def dies_late() -> None:
        slowly()
        on_step(9, lambda: (time.sleep(1), die()))()

    run(apart, dies_late, code=-9)
    expect(checkpoints(apart), "nothing was saved")
    run(apart, slowly)
    expect_equal(whole, apart, "saved on a thread")

    def fails() -> None:
        def refuse() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        on_call(checkpoint, "_write", refuse, calls=2)
        on_step(7, lambda: time.sleep(0.3))()

    broken = settings(folder, "broken", checkpoint={"every": 3, "background": True})
    text = run(broken, fails, code=2)
    expect("No space left" in text, text[-300:])
    expect(
        len(records(broken)) <= 7,
        f"the error of step 6 ended the run after step {len(records(broken))}",
    )
    return (
        "keep 1, 2, 3 right, the best too, damaged ones do not count; on a thread: exact, its "
        "error ends the next step"
    )
