"""Runs of several ranks for tests: real processes, on the CPU, over gloo; `start` has torchrun start
them, `run` forks them, which is quicker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file

from sftx.settings.load import load_config
from sftx.training.loop import train

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def model(path: Path) -> str:
    """Three layers, tied embeddings."""
    return tiny.folder(path, num_hidden_layers=3)


def write_run(folder: Path, model: str | dict[str, Any], name: str, **changes: Any) -> Path:
    """A run of 20 steps whose last step of each epoch is ragged: with one token per pack it has 3
    packs.
    """
    rows = folder / "rows.jsonl"
    if not rows.exists():
        lines = [
            json.dumps([f"What is {i} plus {i}?", f"It is {2 * i}" + "!" * (i % 7)])
            for i in range(43)
        ]
        rows.write_text("\n".join(lines[:35]) + "\n", encoding="utf-8")
        (folder / "held.jsonl").write_text("\n".join(lines[35:]) + "\n", encoding="utf-8")
    config: dict[str, Any] = {
        "model": model,
        "data": {
            "train": str(rows),
            "eval": str(folder / "held.jsonl"),
            "cache": str(folder / "cache"),
            "workers": 0,
        },
        "output": str(folder / name),
        "batch": {"examples_per_step": 4, "epochs": 20 / 9},
        "optim": {"learning_rate": 3e-3, "weight_decay": 0.1},
        "runtime": {"device": "cpu", "threads": 1, "tokens_per_pack": 48, "rank_timeout": 60},
    }
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def launcher(count: int) -> list[str]:
    """The command that starts a module or a program on so many ranks; for 0, without torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [sys.executable, *(torchrun if count else [])]


def start(
    path: Path, ranks: int, program: list[str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """The launcher of a run; 0 ranks = one process without torchrun. `program` replaces `-m sftx
    train`.
    """
    command = [*launcher(ranks), *(program or ["-m", "sftx", "train"]), str(path)]
    return subprocess.Popen(
        command,
        text=True,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def run(path: Path, ranks: int, program: list[str] | None = None) -> str:
    """What a run printed, once it has ended well. `program` replaces `-m sftx train`; 0 ranks run in
    this process, unless there is a program.
    """
    if not ranks and program is None:
        train(load_config(str(path)))
        return ""
    if not ranks:
        process = start(path, 0, program)
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output
        return output
    first, *_ = str(path).split(",")
    log = Path(first).with_name("ranks.log")
    log.write_bytes(b"")
    words = [*(program or ["-m", "sftx", "train"]), str(path)]
    pool = _pool()
    assert pool.stdin is not None
    assert pool.stdout is not None
    pool.stdin.write(json.dumps({"words": words, "count": ranks, "log": str(log)}) + "\n")
    pool.stdin.flush()
    code = pool.stdout.readline().strip()
    output = log.read_text(encoding="utf-8", errors="replace")
    assert code == "0", output
    return output


def together(paths: list[Path], ranks: int) -> None:
    """Train one run after the other in the same processes."""
    if not ranks:
        for path in paths:
            run(path, 0)
        return
    several = Path(__file__).with_name("several_runs.py")
    run(Path(",".join(map(str, paths))), ranks, [str(several)])


@cache
def _pool() -> subprocess.Popen[str]:
    """The process that ranks are forked from; it ends when this one closes its input."""
    program = Path(__file__).with_name("rank_pool.py")
    return subprocess.Popen(
        [sys.executable, str(program)],
        text=True,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def records(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run, without that of step 0."""
    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line["step"]]


def facts(folder: Path) -> dict[str, Any]:
    """run.json."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def difference(one: Path, other: Path) -> float:
    """The largest difference of any weight between two trained folders."""
    name = (
        "model.safetensors" if (one / "model.safetensors").exists() else "adapter_model.safetensors"
    )
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    return max(
        float((first[key] - second[key]).abs().max())
        for key in first
        if isinstance(first[key], torch.Tensor)
    )
