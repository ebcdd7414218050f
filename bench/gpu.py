"""Speed and memory on one NVIDIA GPU, against TRL and Unsloth, in one run of at most ten minutes and
without a network.

    # Everything that fits into 9 minutes, the figures asked for first
    python bench/gpu.py --minutes 9
    python bench/gpu.py --only llama-3.1-8b,deterministic   # cells whose name holds one of these
    python bench/gpu.py --smoke                             # on a CPU with a tiny shape

A first stage of at most 90 seconds (`gpu_first.py`) asks in this order, and prints each answer as soon
as it is known: does a run on this device work at all; are the numbers right (attention and gradients
against float64); how often does the host wait for the device, and where; is a run the same to the
bit; are compiled layers right. What 90 seconds do not reach is asked once more at the end.

Then every cell runs in a process of its own with its own time limit; its last step runs under
PyTorch's profiler (`gpu_profile.py`) and counts for nothing else. The JSON file is written after each
answer and each cell, errors with their tracebacks in it, so that nothing is lost when one fails or
time runs out. `sftx-fsdp` cells hold an adapter in one shard of `fully_shard`, compiled and with all
layers recomputed; `sftx-deterministic` shows the price of `runtime.deterministic`; beside the peak of
sftx's cells stands what was predicted. What is not installed (TRL, Liger, Unsloth, bitsandbytes) is
reported and passed over.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_first import MARK, answer, questions
from gpu_table import line, summary
from peers import SHAPES, rows

HERE = Path(__file__).parent
FIRST_SECONDS = 90
SHARDED = ("lora", "qlora", "dora")
"""On one rank of `fully_shard`, compiled, all layers recomputed."""
WARM_UP = 5
"""Steps that no figure contains: compilation, allocation, the first look at every length."""
ROOM = {"bf16_stochastic": 120}
"""GiB below which a cell of that method is not tried."""


def cells(smoke: bool) -> list[dict[str, Any]]:
    """What is measured, the most wanted first: (shape, method, tokens per pack) x system."""
    if smoke:
        order = [(("smoke", method, 512), "sftx") for method in ("full", "lora")]
        order += [(("smoke", "lora", 512), system) for system in ("sftx-fsdp", "trl-packing")]
        return [_cell(*one) for one in order]
    first = [
        ("qwen3-0.6b", "full", 16384),
        ("llama-3.1-8b", "lora", 8192),
        ("llama-3.2-1b", "full", 16384),
        ("qwen3-0.6b", "lora", 4096),
    ]
    second = [
        ("llama-3.1-8b", "lora", 16384),
        ("qwen3-0.6b", "full", 8192),
        ("llama-3.2-1b", "full", 8192),
    ]
    order = [(cell, "sftx") for cell in first]
    order += [(cell, "trl-packing") for cell in first[:2]]
    order += [(first[0], "sftx-deterministic"), (("llama-3.1-8b", "bf16_stochastic", 8192), "sftx")]
    order += [(first[3], "unsloth"), (first[0], "trl-packing-liger"), (first[1], "unsloth")]
    order += [(cell, "trl-packing") for cell in first[2:]]
    order += [(("llama-3.1-8b", method, 8192), "sftx-fsdp") for method in SHARDED]
    order += [(cell, "sftx") for cell in second]
    order += [(cell, "trl-packing-liger") for cell in first[1:]]
    order += [(cell, "trl-packing") for cell in second]
    return [_cell(*one) for one in order]


def _cell(what: tuple[str, str, int], system: str) -> dict[str, Any]:
    shape, method, pack = what
    name = f"{shape}/{method}/{pack}/{system}"
    return {"name": name, "shape": shape, "method": method, "pack": pack, "system": system}


def main() -> None:
    """Ask, measure, print; the last line holds the figures."""
    args = arguments()
    if args.part:
        part(json.loads(args.part))
        return
    end = time.monotonic() + 60 * args.minutes
    args.scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"first": {}, "cells": []}
    names = [*questions(args.scratch, args.smoke)]
    asked = names[:1] if args.skip_checks else names
    left = first_stage(args, found, asked, min(FIRST_SECONDS, end - time.monotonic()))
    device = found["first"].get("device", {}).get("answer", {})
    if not args.smoke and not device.get("cuda"):
        sys.exit(f"no CUDA device: {found['first']}; `--smoke` runs on a CPU")
    for cell in cells(args.smoke):
        if not any(part in cell["name"] for part in args.only.split(",")):
            continue
        if end - time.monotonic() < 20:
            print(f"{cell['name']}: no time left", flush=True)
            continue
        figures = {**cell, **measure(args, cell, device, end)}
        found["cells"].append(figures)
        print(line(figures, device, args.peak), flush=True)
        write(args.json, found)
    if left and end - time.monotonic() > 20:
        first_stage(args, found, left, end - time.monotonic())
    summary(found["cells"], args.smoke)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="budget of the whole run")
    parser.add_argument("--only", default="", help="parts of SHAPE/METHOD/PACK/SYSTEM, by commas")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each cell")
    parser.add_argument(
        "--peak", type=float, help="dense bf16 FLOP/s of a device whose name is not known here"
    )
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "sftx-bench-gpu"
    )
    parser.add_argument("--skip-checks", action="store_true", help="leave out the first stage")
    parser.add_argument("--smoke", action="store_true")
    # What a process of its own is to do, as JSON
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def write(path: Path, found: dict[str, Any]) -> None:
    """All that is known so far; whoever reads it never sees half of it."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(found, indent=1))
    beside.replace(path)


def first_stage(
    args: argparse.Namespace, found: dict[str, Any], names: list[str], seconds: float
) -> list[str]:
    """Ask the questions; the names of those that were not reached.

    One process answers all of them, unless it dies: then the next one goes on with the question
    after.
    """
    left, until = list(names), time.monotonic() + seconds

    def told(said: dict[str, Any]) -> None:
        left.remove(said["name"])
        found["first"][said["name"]] = said
        shown = f"FAILED {said['error']}" if "error" in said else json.dumps(said["answer"])
        print(f"first {said['name']} ({said['seconds']} s): {shown}", flush=True)
        write(args.json, found)

    while left and until - time.monotonic() > 5:
        before = len(left)
        done = ask(args, {"do": "first", "names": left}, until - time.monotonic(), told)
        if done.get("late"):
            break
        if len(left) == before:  # it died over the first of them
            told({"name": left[0], "seconds": 0.0, **done, "error": done.get("error", "no answer")})
    for name in left:
        print(f"first {name}: not reached", flush=True)
    return left


def ask(
    args: argparse.Namespace,
    work: dict[str, Any],
    seconds: float,
    told: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Do `work` in a process of its own: its last line of JSON, or {"error", "traceback", "late"};
    `told` gets every line of JSON as soon as it is printed.
    """
    work = {**work, "scratch": str(args.scratch), "smoke": args.smoke}
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    if work["do"] == "first":  # read when CUDA starts, which is before the deterministic run
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if args.smoke:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(HERE / "gpu.py"), "--part", json.dumps(work)]
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        # Whatever it has started dies with it
        timer = threading.Timer(max(seconds, 5), os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith(MARK):
                last = json.loads(text.removeprefix(MARK))
                if told is not None:
                    told(last)
        process.wait()
        late = not timer.is_alive()
        timer.cancel()
        errors.seek(0)
        said = errors.read().strip()
    if late:
        return {"error": f"not done after {seconds:.0f} s", "traceback": said[-6000:], "late": True}
    if process.returncode or not last:
        error = said.split("\n")[-1][-400:] or f"ended with {process.returncode}, without a word"
        return {"error": error, "traceback": said[-6000:]}
    return last


def measure(
    args: argparse.Namespace, cell: dict[str, Any], device: dict[str, Any], end: float
) -> dict[str, Any]:
    """The cell's figures from the first set-up that works: the fastest one first, then those that
    need less memory.
    """
    if absent := [name for name in needed(cell) if importlib.util.find_spec(name) is None]:
        return {"failed": [{"setup": {}, "error": f"not installed: {', '.join(absent)}"}]}
    if not args.smoke and device.get("memory_gib", 0) < ROOM.get(cell["method"], 0):
        return {"failed": [{"setup": {}, "error": f"takes {ROOM[cell['method']]} GiB"}]}
    steps = args.steps if cell["shape"] != "llama-3.1-8b" else max(args.steps // 2, 5)
    steps = WARM_UP + (2 if args.smoke else steps)
    failed: list[dict[str, Any]] = []
    for attempt in attempts(cell, args.smoke):
        left = end - time.monotonic()
        if left < 15:
            break
        refused = [
            "do not compile" in e["error"] and "out of memory" not in e["error"] for e in failed
        ]
        if attempt.get("compile") == "on" and any(refused):
            continue
        figures = ask(args, {"do": "cell", "steps": steps, **cell, **attempt}, min(240, left))
        if "error" not in figures:
            return {"setup": attempt, "failed": failed, **figures}
        failed.append({"setup": attempt, **figures})
    return {"failed": failed}


def attempts(cell: dict[str, Any], smoke: bool) -> list[dict[str, Any]]:
    """The set-ups of a cell, in the order in which they are tried."""
    ours = cell["system"].startswith("sftx")
    if smoke:
        return [{"compile": "off"} if ours else {}]
    if cell["system"] == "sftx-fsdp":
        return [{"compile": "on", "recompute": "all"}, {"compile": "off", "recompute": "all"}]
    if ours:
        return [{"compile": "on"}, {"compile": "on", "recompute": "all"}, {"compile": "off"}]
    return [{}, {"checkpointing": True}]


def needed(cell: dict[str, Any]) -> list[str]:
    """The modules that a cell takes beside those of sftx."""
    match cell["system"]:
        case "unsloth":
            return ["unsloth", "unsloth_zoo", "trl", "datasets"]
        case "trl-packing-liger":
            return ["trl", "datasets", "liger_kernel"]
        case "trl-packing":
            return ["trl", "datasets"]
        case _:
            return ["bitsandbytes"] if cell["method"] == "qlora" else []


def part(work: dict[str, Any]) -> None:
    """In a process of its own: do the work and print it as lines of JSON."""
    scratch = Path(work["scratch"])
    if work["do"] == "first":
        answer(work["names"], scratch, work["smoke"])
        return
    print(f"\n{MARK}{json.dumps(run(work, scratch))}", flush=True)


def make(shape: str, scratch: Path) -> None:
    """Random weights on disk, made on the device in the dtype that is stored (8B: bf16, 16 GB)."""
    import peers
    import torch

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        peers.folder(shape, scratch, "bfloat16" if shape == "llama-3.1-8b" else "float32")
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def one_pack(work: dict[str, Any]) -> tuple[list[dict[str, list[int]]], int]:
    """The rows of a step, which fill one pack as far as whole rows do, and their tokens."""
    vocabulary = SHAPES[work["shape"]]["vocab_size"]
    data = rows(work["pack"], vocabulary, longest=work["pack"])  # more than enough
    total, batch = 0, 0
    while total + len(data[batch]["input_ids"]) <= work["pack"]:
        total, batch = total + len(data[batch]["input_ids"]), batch + 1
    return data[:batch], total


def run(work: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One cell through `peers`: seconds per step after the warm-up, memory, contents of a step, and
    the profile of one step more.
    """
    import peers

    system = work["system"]
    if system == "unsloth":
        __import__("unsloth")  # it changes transformers and TRL while they are imported
    make(work["shape"], scratch)
    data, total = one_pack(work)
    ours, steps, profile = system.startswith("sftx"), work["steps"] + 1, dict[str, Any]()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        job = job_of(work, scratch, folder, len(data)) | {"steps": steps}
        if system == "sftx-fsdp":
            _join_alone()
        clock = peers.Clock(() if ours else (WARM_UP, steps - 1))
        runs = peers.run_sftx if ours else peers.run_hf
        facts: dict[str, Any] = runs(job, data * steps, clock, profile)
    counts: dict[str, float] = {
        "tokens": total,
        "targets": sum(label >= 0 for row in data for label in row["labels"]),
        "squares": sum(len(row["input_ids"]) ** 2 for row in data),
    }
    counts |= {key: facts[key] for key in counts if key in facts}
    # TRL's packs hold a little more or less than one step of rows
    counts["squares"] *= counts["tokens"] / total
    measured = clock.wall[WARM_UP:-1] if ours else clock.wall[1:2]
    return {
        **facts,
        **counts,
        "wall": sum(measured) / len(measured),
        "peak": peers.peak_memory(),
        "profile": profile,
    }


def job_of(work: dict[str, Any], scratch: Path, folder: str, batch: int) -> dict[str, Any]:
    """The job of a cell, as `peers` takes it."""
    import torch

    cuda, system = torch.cuda.is_available(), work["system"]
    flash = cuda and importlib.util.find_spec("flash_attn") is not None
    return {
        "system": system.removesuffix("-liger").partition("-fsdp")[0].partition("-determ")[0],
        "shape": work["shape"],
        "model": str(scratch / work["shape"]),
        "method": work["method"],
        "precision": "bf16",
        "batch": batch,
        "length": 4096,
        "threads": min(8, os.cpu_count() or 1) if cuda else 1,
        "pack_length": work["pack"],
        "pack_steps": 1,
        "tokens_per_pack": work["pack"],
        "output": f"{folder}/run",
        "cache": f"{folder}/cache",
        "compile": work.get("compile"),
        "recompute": work.get("recompute"),
        "parallel": "fsdp" if system == "sftx-fsdp" else None,
        "deterministic": system == "sftx-deterministic",
        "micro_batch": max(size for size in range(1, 17) if batch % size == 0),
        "checkpointing": work.get("checkpointing"),
        "liger": system.endswith("liger"),
        "attention": "flash_attention_2" if flash else "sdpa",
        "dtype": "bfloat16" if work["shape"] == "llama-3.1-8b" else "float32",
    }


def _join_alone() -> None:
    """What torchrun would say to its only process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


if __name__ == "__main__":
    main()
