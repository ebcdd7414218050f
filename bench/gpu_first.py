"""The first questions to a device, each answered and printed as soon as known; see `gpu.py`.

In this order: does a run work at all; are the numbers right; how often does the host wait for the
device; is a run the same to the bit where that is asked for; and last, because they take longest,
are the numbers of compiled layers right.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "@@ "
"""What a line of JSON for `gpu.py` begins with; all else that is printed is not for it."""
WATCHED = 5
"""Steps in which waits are counted, after as many that are not looked at."""


def questions(scratch: Path, smoke: bool) -> dict[str, Callable[[], Any]]:
    """Every question by its name, in the order in which they are asked."""
    import gpu_checks

    asked: dict[str, Callable[[], Any]] = {
        "device": gpu_checks.device,
        "run_full": lambda: works("full", scratch),
        "run_lora": lambda: works("lora", scratch),
        **gpu_checks.checks(),
        "host_device_syncs": lambda: syncs("full", scratch),
        "host_device_syncs_lora": lambda: syncs("lora", scratch),
        "resume_is_bitwise": lambda: resume(scratch, deterministic=False),
        "deterministic_is_bitwise": lambda: resume(scratch, deterministic=True),
    }
    if smoke:
        # Nothing waits for a CPU, and a run on it is the same to the bit anyway.
        del asked["host_device_syncs_lora"], asked["resume_is_bitwise"]
        return asked
    return asked | gpu_checks.compiled_checks()


def answer(names: list[str], scratch: Path, smoke: bool) -> None:
    """Print the answers to these questions, one line of JSON each.

    An error of the device leaves nothing usable behind: then the process ends, and another one goes
    on.
    """
    asked = questions(scratch, smoke)
    for name in names:
        began = time.perf_counter()
        found: dict[str, Any] = {"name": name}
        error: Exception | None = None
        try:
            found["answer"] = asked[name]()
        except Exception as caught:  # each must leave its word, whatever it is
            error = caught
            found["error"] = f"{type(caught).__name__}: {str(caught)[:400]}"
            found["traceback"] = traceback.format_exc()[-6000:]
        found["seconds"] = round(time.perf_counter() - began, 1)
        print(f"\n{MARK}{json.dumps(found)}", flush=True)
        if error is not None and "CUDA error" in str(error):
            os._exit(1)


def works(method: str, scratch: Path) -> dict[str, Any]:
    """20 steps of a model of the shape of stories260K, as a user runs them."""
    folder = scratch / f"first-{method}"
    run = _train(folder, scratch, method, steps=20)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    losses = [record["loss"] for record in records if record["loss"] is not None]
    if not losses or not math.isfinite(losses[-1]) or losses[-1] >= losses[0]:
        raise AssertionError(f"the loss did not fall: {losses}")
    later = records[-10:]
    seconds = sum(record["seconds"] for record in later)
    return {
        "loss": [losses[0], losses[-1]],
        "tokens_per_second": round(sum(record["tokens"] for record in later) / seconds),
        "peak_mib": round(later[-1]["memory"] / 2**20),
        "run_seconds": round(run.seconds, 1),
    }


def _train(folder: Path, scratch: Path, method: str, steps: int) -> Any:
    import peers

    import sftx

    shutil.rmtree(folder, ignore_errors=True)
    adapter: dict[str, Any] = {"adapter": {"method": "lora"}} if method == "lora" else {}
    vocabulary = peers.SHAPES["stories260K"]["vocab_size"]
    return sftx.train(
        model=peers.folder("stories260K", scratch),
        output=str(folder),
        data={"rows": peers.rows(64, vocabulary), "cache": str(scratch / "first-cache")},
        batch={"examples_per_step": 8, "steps": steps},
        optim={"learning_rate": 3e-3, "schedule": "constant", "warmup": 0},
        runtime={"progress": False, "report": False},
        **adapter,
    )


def syncs(method: str, scratch: Path) -> dict[str, Any]:
    """How often the host waits for the device in a step, and where: `sftx.train` under PyTorch's
    own watch, which warns at every such call.

    It does not see that a step's numbers are read while the next one computes.
    """
    import torch

    from sftx.training import loop

    set_mode = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else lambda _: None
    own, taken = loop.train_step, 0

    def watched(*given: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == WATCHED + 1:
            set_mode("warn")
        if taken == 2 * WATCHED + 1:
            set_mode("default")
        return own(*given)

    loop.train_step = watched
    try:
        with sync_sites() as sites:
            _train(scratch / f"syncs-{method}", scratch, method, steps=2 * WATCHED + 3)
    finally:
        loop.train_step = own
        set_mode("default")
    return {"per_step": sum(sites.values()) / WATCHED, "sites": dict(sites.most_common(20))}


@contextmanager
def sync_sites() -> Iterator[Counter[str]]:
    """Count the warnings of `torch.cuda.set_sync_debug_mode` by the lines of code that led there.

    What a backward pass computes on threads of PyTorch's own is counted at the call of `backward`.
    """
    sites: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            stack = traceback.extract_stack()[:-1]
            inside = [frame for frame in stack if "warnings.py" not in frame.filename]
            sites[" < ".join(map(_place, inside[-6:][::-1]))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield sites


def _place(frame: traceback.FrameSummary) -> str:
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} {frame.name}"


def resume(scratch: Path, deterministic: bool) -> str:
    """Six steps at once against three, a stop and three more: the weights' bytes.

    Where they differ, six steps once more tell whether it is the stop: flash attention adds up the
    gradients of its queries in any order, unless PyTorch is told to be deterministic.
    """
    import peers

    import sftx

    home = scratch / "resume"
    shutil.rmtree(home, ignore_errors=True)
    model = peers.folder("smoke", home / "models")
    data = peers.rows(24, peers.SHAPES["smoke"]["vocab_size"])

    def steps(name: str, stop_after: int) -> str:
        try:
            for record in sftx.steps(
                model=model,
                output=str(home / name),
                data={"rows": data, "cache": str(home / "cache")},
                batch={"examples_per_step": 8, "steps": 6},
                runtime={
                    "progress": False,
                    "report": False,
                    "tokens_per_pack": 1024,
                    "deterministic": deterministic,
                },
            ):
                if record.step == stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            return ""
        digest = hashlib.sha256()
        for file in sorted((home / name).glob("*.safetensors")):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    once = steps("once", 0)
    steps("twice", 3)
    resumed = steps("twice", 0)
    again = steps("once more", 0)
    if once and once == resumed == again:
        return "equal: two runs, and one that was stopped and continued"
    said = f"{once[:12]}, again {again[:12]}, stopped and continued {resumed[:12]}"
    if deterministic:
        raise AssertionError(f"different weights: {said}")
    return f"DIFFERENT weights: {said}"
