"""One rank of a run under torchrun, with a fault planted: `-m scorecard.worker CONFIG FAULT`.

FAULT is empty, `slow`, `gradients:FILE` (rank 0 writes those of every step there), or
`KIND:RANK:STEP` with a kind of `die`, `hang`, `raise`, `leave`, `drift` (one weight changes in its
last bit) or `other` (the rank has another seed).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scorecard import numbers
from scorecard.runs import on_call, on_step
from sftx.cli import main
from sftx.training import loop


def plant(fault: str) -> None:
    """Put the fault in place in this process."""
    kind, _, rest = fault.partition(":")
    rank, _, step = rest.partition(":")
    acts = {
        "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hang": lambda: time.sleep(10_000),
        "raise": lambda: 1 // 0,
        "leave": lambda: os._exit(0),
    }
    if kind == "slow":
        on_call(loop, "train_step", lambda: time.sleep(0.1), calls=0)
    elif kind in acts and int(os.environ["RANK"]) == int(rank):
        on_step(int(step), acts[kind])()
    elif kind == "drift" and int(os.environ["RANK"]) == int(rank):
        on_call(loop, "train_step", around=lambda original: _drifting(original, int(step)))


def _drifting(train_step: Callable[..., Any], step: int) -> Callable[..., Any]:
    steps = count(1)

    def drifting(model: Any, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == step:
            weight = next(model.parameters()).detach().to_local()
            weight.view(torch.int32)[0, 0] ^= 1
        return train_step(model, *args, **kwargs)

    return drifting


def run(config: str, fault: str) -> int:
    """Train."""
    plant(fault)
    if fault.startswith("gradients:"):
        with numbers.gradients_of_steps() as seen:
            code = main(["train", config])
        if os.environ["RANK"] == "0":
            flat = {
                f"{i}/{name}": tensor
                for i, step in enumerate(seen)
                for name, tensor in step.items()
            }
            save_file(flat, Path(fault.partition(":")[2]))
        return code
    other = fault.startswith(f"other:{os.environ['RANK']}:")
    return main(["train", config, *["seed=7"] * other])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2]))
