"""Training runs as children of a check: started, watched, killed, continued and compared.

A child is forked from the check, which has imported everything but computed nothing: so it starts
in no time, and runs the command line as a user's process would. `before` runs in the child first;
this is where faults are planted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks
import tiny

from scorecard.frame import Failed, environment, expect
from sftx.cli import main
from sftx.training import loop

STEPS = 12


def write_rows(path: Path, rows: list[Any]) -> str:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def shape(dropout: float = 0.0) -> dict[str, Any]:
    """What `tiny.model` makes of the checks' model: Llama, or GPT-2 where dropout is wanted."""
    rates = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    if dropout:
        return {"family": "GPT2", **dict.fromkeys(rates, dropout)}
    return {
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }  # so wide that no distribution is uniform


def settings(
    folder: Path, output: str = "run", dropout: float = 0.1, **changes: Any
) -> dict[str, Any]:
    """A run of `STEPS` steps over two epochs that saves every 3 steps; sections in `changes` are
    merged.
    """
    model, data = folder / f"model-{dropout}", folder / "rows.jsonl"
    if not model.exists():
        tiny.folder(model, **shape(dropout))
    if not data.exists():
        write_rows(data, tiny.pairs(24))
    base: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": str(data), "cache": str(folder / "cache"), "workers": 0},
        "output": str(folder / output),
        "batch": {"examples_per_step": 4, "steps": STEPS},
        "optim": {"learning_rate": 1e-3, "weight_decay": 0.1},
        "checkpoint": {"every": 3},
        "runtime": {"device": "cpu", "threads": 1},
    }
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return base


def write_config(config: dict[str, Any]) -> str:
    """The settings as a file beside the run folder."""
    path = Path(config["output"]).with_suffix(".yaml")
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return str(path)


class Child:
    """A forked process that does `work`; its exit code is what `work` returns, its output goes to a
    file.
    """

    def __init__(self, work: Callable[[], int | None], log: Path) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(work, log)

    def wait(self, seconds: float = 60) -> int:
        """The exit code; negative = the signal that ended it. `Failed` when it does not end."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        self.kill()
        os.waitpid(self.pid, 0)
        raise Failed(f"a run did not end in {seconds:g} s: {self.text[-300:]}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def _become(work: Callable[[], int | None], log: Path) -> None:
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        # Those of a test runner would keep warnings to themselves
        logging.getLogger().handlers.clear()
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(
    config: dict[str, Any], before: Callable[[], Any] = lambda: None, verb: str = "train"
) -> Child:
    """`sftx train` on these settings, in a child."""
    path = write_config(config)

    def work() -> int:
        before()
        return main([verb, path])

    return Child(work, Path(config["output"]).with_suffix(".log"))


def run(
    config: dict[str, Any], before: Callable[[], Any] = lambda: None, code: int | None = 0
) -> str:
    """`sftx train` to its end; returns what it printed. `Failed` unless it ends with `code` (None:
    any).
    """
    child = start(config, before)
    ended = child.wait()
    expect(
        code is None or ended == code, f"exit code {ended} instead of {code}: {child.text[-400:]}"
    )
    return child.text


def on_call(
    owner: Any,
    name: str,
    act: Callable[[], Any] = lambda: None,
    calls: int = 1,
    around: Callable[[Any], Any] | None = None,
) -> None:
    """In this process, do `act` when function `name` of a module is called the n-th time (0: every
    time).

    With `around`, put what it makes of the function in its place instead.
    """
    original, count = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if calls in (0, count):
            act()
        return original(*args, **kwargs)

    setattr(owner, name, counted if around is None else around(original))


def on_step(number: int, act: Callable[[], Any]) -> Callable[[], None]:
    """A `before` that calls `act` when step `number` (from 1 in this process) is about to be
    computed.
    """
    return lambda: on_call(loop, "train_step", act, number)


def die() -> None:
    """SIGKILL for this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def torchrun(config: dict[str, Any], processes: int = 2, fault: str = "") -> subprocess.Popen[str]:
    """The same run on several gloo processes; `fault` is planted by `scorecard.worker`."""
    log = Path(config["output"]).with_suffix(".log").open("w")
    command = [*ranks.launcher(processes), "-m", "scorecard.worker", write_config(config), fault]
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def run_ranks(
    config: dict[str, Any], processes: int = 2, fault: str = "", code: int | None = 0
) -> str:
    """`torchrun` to its end; returns what was printed."""
    ended = torchrun(config, processes, fault).wait(120)
    text = Path(config["output"]).with_suffix(".log").read_text(errors="replace")
    wrong = [
        line for line in text.splitlines() if "rror" in line and "torch.distributed" not in line
    ]
    expect(
        code is None or ended == code,
        f"exit code {ended} instead of {code}: {(wrong or [text[-300:]])[0]}",
    )
    return text


def records(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl (that of step 0 left out) without what differs between equal runs:
    time and memory.
    """
    path = Path(config["output"]) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    steps = [step for line in lines if line and (step := json.loads(line))["step"]]
    timing = ("seconds", "seconds_left", "tokens_per_second", "memory")
    return [{k: v for k, v in step.items() if k not in timing} for step in steps]


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """run.json."""
    return json.loads((Path(config["output"]) / "run.json").read_text(encoding="utf-8"))


def digest(config: dict[str, Any]) -> str:
    """sha256 of the trained weights."""
    files = sorted(Path(config["output"]).glob("*model*.safetensors"))
    expect(files, f"no trained weights in {config['output']}")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def checkpoints(config: dict[str, Any]) -> list[str]:
    """Names in the folder of checkpoints."""
    folder = Path(config["output"]) / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def expect_equal(
    one: dict[str, Any], other: dict[str, Any], what: str = "the continued run"
) -> int:
    """Both runs have the same records and weights, to the bit; returns the number of steps
    compared.
    """
    first, second = records(one), records(other)
    expect(len(first) == len(second) > 0, f"{what}: {len(second)} steps recorded, not {len(first)}")
    for a, b in zip(first, second, strict=True):
        odd = {key: (a[key], b[key]) for key in a if a[key] != b[key]}
        expect(not odd, f"{what}: step {a['step']} differs: {odd}")
    expect(digest(one) == digest(other), f"{what}: the final weights differ")
    return len(first)
