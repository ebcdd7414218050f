"""Speed and memory on one NVIDIA GPU, against TRL, in one run of at most ten minutes and without a
network.

    # Everything that fits into 9 minutes, the figures asked for first
    python bench/gpu.py
    python bench/gpu.py --only llama-3.1-8b    # cells whose name holds this
    python bench/gpu.py --smoke                # the same on a CPU with a tiny shape, in seconds

First the numbers are checked on this very device: attention against float64, gradients against the
naive loss, a continued run against an uninterrupted one, and that nothing in a step makes the host
wait. Then every cell runs in a process of its own with its own time limit, and the JSON file is
written after each, so that nothing is lost when one fails or time runs out. `sftx-fsdp` cells hold
an adapter in one shard of `fully_shard`, compiled and with all layers recomputed; beside the peak
of sftx's cells stands what was predicted. What is not installed (TRL, Liger, FlashAttention) is
reported and passed over.

MFU = F / (seconds x peak), F per step, dense bf16 peak, nothing counted for padding or
recomputation:

    full: F = 6 N_body T + 6 N_head M + 6 L h_q sum(s^2)
    LoRA: F = 4 N_body T + 4 N_head M + 6 L h_q sum(s^2) + 6 N_lora T

(T tokens, M targets, s lengths of segments, L layers, h_q = heads x head size; causal attention
counts half of s^2).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import SHAPES, rows

HERE = Path(__file__).parent
# The first that the name of the device holds; of "H100" and "H200" the boards with SXM sockets
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}
SHARDED = ("lora", "qlora", "dora")  # on one rank of `fully_shard`, compiled, all layers recomputed
WARM_UP = (
    5  # steps that no figure contains: compilation, allocation, the first look at every length
)


def cells(smoke: bool) -> list[dict[str, Any]]:
    """What is measured, the most wanted first: (shape, method, tokens per pack) x system."""
    if smoke:
        wanted = [("smoke", "full", 512), ("smoke", "lora", 512)]
        wanted = [(cell, system) for cell in wanted for system in ("sftx", "trl-packing")]
        wanted += [(("smoke", method, 512), "sftx-fsdp") for method in SHARDED]
        return [
            {"shape": s, "method": m, "pack": p, "system": system} for (s, m, p), system in wanted
        ]
    first = [
        ("qwen3-0.6b", "full", 16384),
        ("llama-3.1-8b", "lora", 8192),
        ("llama-3.2-1b", "full", 16384),
    ]
    second = [
        ("llama-3.1-8b", "lora", 16384),
        ("qwen3-0.6b", "full", 8192),
        ("llama-3.2-1b", "full", 8192),
    ]
    order = [(cell, system) for cell in first for system in ("sftx", "trl-packing")]
    order += [(("llama-3.1-8b", method, 8192), "sftx-fsdp") for method in SHARDED]
    order += [(cell, "sftx") for cell in second]
    order += [(cell, "trl-packing-liger") for cell in first] + [
        (cell, "trl-packing") for cell in second
    ]
    order += [(cell, "trl") for cell in first]
    return [{"shape": s, "method": m, "pack": p, "system": system} for (s, m, p), system in order]


def main() -> None:
    """Check, measure, print; the last line holds the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="budget of the whole run")
    parser.add_argument("--only", default="", help="part of SHAPE/METHOD/PACK/SYSTEM")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each cell")
    parser.add_argument(
        "--peak",
        type=float,
        help="dense bf16 FLOP/s of the device, where its name is not known here",
    )
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "sftx-bench-gpu"
    )
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--part", help=argparse.SUPPRESS
    )  # what a process of its own is to do, as JSON
    args = parser.parse_args()
    if args.part:
        part(json.loads(args.part))
        return
    end = time.monotonic() + 60 * args.minutes
    args.scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"device": ask(args, {"do": "device"}, 120), "checks": {}, "cells": []}
    if not args.smoke and not found["device"].get("cuda"):
        sys.exit(f"no CUDA device: {found['device']}; `--smoke` runs on a CPU")
    print(json.dumps(found["device"]), flush=True)
    if not args.skip_checks:
        found["checks"] = ask(args, {"do": "checks"}, min(150, end - time.monotonic()))
        for name, value in found["checks"].items():
            print(f"check {name}: {value}", flush=True)
        args.json.write_text(json.dumps(found, indent=1))
    made: set[str] = set()
    for cell in cells(args.smoke):
        name = f"{cell['shape']}/{cell['method']}/{cell['pack']}/{cell['system']}"
        left = end - time.monotonic()
        if args.only not in name:
            continue
        if left < 20:
            print(f"{name}: no time left", flush=True)
            continue
        if cell["shape"] not in made:
            made.add(cell["shape"])
            making = ask(args, {"do": "make", "shape": cell["shape"]}, min(150, left))
            if "error" in making:
                print(f"{cell['shape']}: {making['error']}", flush=True)
        figures = {"name": name, **cell, **measure(args, cell, end)}
        found["cells"].append(figures)
        print(line(figures, found["device"], args), flush=True)
        args.json.write_text(json.dumps(found, indent=1))
    summary(found["cells"], args.smoke)


def ask(args: argparse.Namespace, work: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Do `work` in a process of its own; its JSON, or {"error": ...}."""
    work = {**work, "scratch": str(args.scratch), "smoke": args.smoke}
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    if args.smoke:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(HERE / "gpu.py"), "--part", json.dumps(work)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=max(seconds, 5)
        )
    except subprocess.TimeoutExpired as late:
        error = {"error": f"not done after {seconds:.0f} s"}
        so_far = (late.stdout or b"").decode(errors="replace").strip().split("\n")[-1]
        return (
            {**json.loads(so_far), **error}
            if so_far.startswith("{") and so_far.endswith("}")
            else error
        )
    if done.returncode:
        return {"error": (done.stderr.strip() or done.stdout.strip())[-1500:]}
    try:
        return json.loads(done.stdout.strip().split("\n")[-1])
    except (json.JSONDecodeError, IndexError):
        return {"error": f"no figures in the output: {done.stdout[-300:]}"}


def measure(args: argparse.Namespace, cell: dict[str, Any], end: float) -> dict[str, Any]:
    """The cell's figures from the first set-up that works: the fastest one first, then those that
    need less memory.
    """
    attempts: list[dict[str, Any]] = [
        {"compile": "on"},
        {"compile": "on", "recompute": "all"},
        {"compile": "off"},
    ]
    if cell["system"] == "sftx-fsdp":
        attempts = [{"compile": "on", "recompute": "all"}, {"compile": "off", "recompute": "all"}]
    elif cell["system"] != "sftx":
        attempts = [{}, {"checkpointing": True}]
    steps = WARM_UP + (
        3
        if args.smoke
        else args.steps
        if cell["shape"] != "llama-3.1-8b"
        else max(args.steps // 2, 5)
    )
    if args.smoke:
        attempts, steps = [{} if cell["system"].startswith("trl") else attempts[-1]], WARM_UP + 3
    failed: list[dict[str, Any]] = []
    if absent := [name for name in needed(cell) if importlib.util.find_spec(name) is None]:
        return {"failed": [{"setup": {}, "error": f"needs {', '.join(absent)}, not installed"}]}
    for attempt in attempts:
        left = end - time.monotonic()
        if left < 15:
            break
        refused = [
            "do not compile" in e["error"] and "out of memory" not in e["error"] for e in failed
        ]
        if attempt.get("compile") == "on" and any(refused):
            continue
        figures = ask(args, {"do": "cell", "steps": steps, **cell, **attempt}, min(200, left))
        if "error" not in figures:
            return {"setup": attempt, "failed": failed, **figures}
        failed.append({"setup": attempt, "error": figures["error"]})
    return {"failed": failed}


def needed(cell: dict[str, Any]) -> list[str]:
    """The modules that a cell takes beside those of sftx."""
    if cell["system"].startswith("trl"):
        return ["trl", "datasets", *(["liger_kernel"] if cell["system"].endswith("liger") else [])]
    return ["bitsandbytes"] if cell["method"] == "qlora" else []


def line(figures: dict[str, Any], device: dict[str, Any], args: argparse.Namespace) -> str:
    """One row of the table; adds what is derived to `figures`."""
    if "wall" not in figures:
        errors = [entry["error"].strip().split("\n")[-1][:160] for entry in figures["failed"]]
        return f"{figures['name']:44} failed: {'; then '.join(errors) or 'no time left'}"
    per_second = 1 / figures["wall"]
    peak = args.peak or next(
        (value for key, value in PEAKS.items() if key in device.get("name", "")), 0.0
    )
    figures["tokens_per_second"] = figures["tokens"] * per_second
    figures["targets_per_second"] = figures["targets"] * per_second
    mfu = flops(figures) * per_second / peak if peak else None
    figures["mfu"] = mfu
    share = "    - " if mfu is None else f"{100 * mfu:5.1f} %"
    predicted = (
        f" ({figures['predicted'] / 2**30:.1f} predicted)" if figures.get("predicted") else ""
    )
    speed = (
        f"{figures['tokens_per_second']:9.0f} tok/s {figures['targets_per_second']:9.0f} "
        f"targets/s MFU {share}"
    )
    return (
        f"{figures['name']:44} {speed} {figures['peak'] / 2**30:6.1f} GiB{predicted}  loss "
        f"{figures['loss']:.5f}  "
        f"{figures['setup']}"
    )


def flops(figures: dict[str, Any]) -> float:
    """F of the module's formula for one step."""
    s = SHAPES[figures["shape"]]
    head = s.get("head_dim", s["hidden_size"] // s["num_attention_heads"])
    q, kv, h, i = (
        s["num_attention_heads"] * head,
        s["num_key_value_heads"] * head,
        s["hidden_size"],
        s["intermediate_size"],
    )
    layers = s["num_hidden_layers"]
    body = layers * (2 * h * q + 2 * h * kv + 3 * h * i)
    low_rank = (
        layers * 16 * (2 * (h + q) + 2 * (h + kv) + 3 * (h + i))
    )  # rank 16 on all linear layers
    factor, added = (6, 0) if figures["method"] == "full" else (4, 6 * low_rank)
    dense = (factor * body + added) * figures["tokens"] + factor * h * s["vocab_size"] * figures[
        "targets"
    ]
    return dense + 6 * layers * q * figures["squares"]


def summary(done: list[dict[str, Any]], smoke: bool) -> None:
    """The last line: tokens per second of the wanted shapes, and the ratio to TRL's best, cell by
    cell.
    """
    best: dict[str, float] = {}
    ratios = []
    for cell in {(c["shape"], c["method"], c["pack"]) for c in done}:
        speed = {
            c["system"]: c["tokens_per_second"]
            for c in done
            if (c["shape"], c["method"], c["pack"]) == cell and "tokens_per_second" in c
        }
        rivals = [value for system, value in speed.items() if system.startswith("trl")]
        if "sftx" in speed:
            name = cell[0] + ("-lora" if cell[1] == "lora" else "")
            best[name] = max(best.get(name, 0.0), speed["sftx"])
            ratios += [speed["sftx"] / max(rivals)] if rivals else []
    wanted = sorted(best) if smoke else ["qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b-lora"]
    shown = [f"{name}={best[name]:.0f}" if name in best else f"{name}=none" for name in wanted]
    print("gpu " + " ".join(shown) + (f" vs_trl={min(ratios):.2f}" if ratios else " vs_trl=none"))


def part(work: dict[str, Any]) -> None:
    """In a process of its own: do the work and print it as one line of JSON."""
    from gpu_checks import checks, device

    scratch = Path(work["scratch"])
    match work["do"]:
        case "device":
            result = device()
        case "checks":
            result = checks(scratch, work["smoke"])
        case "make":
            result = make(work["shape"], scratch)
        case _:
            result = run(work, scratch)
    print("\n" + json.dumps(result))


def make(shape: str, scratch: Path) -> dict[str, Any]:
    """Random weights on disk, made on the device in the dtype that is stored (8B: bf16, which is 16
    GB).
    """
    import peers
    import torch

    began = time.perf_counter()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        path = peers.folder(shape, scratch, "bfloat16" if shape == "llama-3.1-8b" else "float32")
    return {"path": path, "seconds": time.perf_counter() - began}


def run(work: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One cell through `peers`: seconds per step after the warm-up, memory, contents of a step."""
    import peers
    import torch

    cuda, system = torch.cuda.is_available(), work["system"]
    vocabulary = SHAPES[work["shape"]]["vocab_size"]
    data = rows(
        work["pack"], vocabulary, longest=work["pack"]
    )  # more than enough; then cut to one pack
    total, batch = 0, 0
    while total + len(data[batch]["input_ids"]) <= work["pack"]:
        total, batch = total + len(data[batch]["input_ids"]), batch + 1
    data = data[:batch]
    flash = importlib.util.find_spec("flash_attn") is not None
    micro = max(size for size in range(1, 17) if batch % size == 0)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        job = {
            "system": system.removesuffix("-liger").removesuffix("-fsdp"),
            "shape": work["shape"],
            "model": str(scratch / work["shape"]),
            "method": work["method"],
            "precision": "bf16",
            "batch": batch,
            "steps": work["steps"],
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
            "micro_batch": micro,
            "checkpointing": work.get("checkpointing"),
            "liger": system.endswith("liger"),
            "attention": "flash_attention_2" if flash and cuda else "sdpa",
            "dtype": "bfloat16" if work["shape"] == "llama-3.1-8b" else "float32",
        }
        ours = system.startswith("sftx")
        if system == "sftx-fsdp":  # what torchrun would say to its only process
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            os.environ |= {
                "RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        clock = peers.Clock(() if ours else (WARM_UP, work["steps"]))
        facts: dict[str, Any] = (peers.run_sftx if ours else peers.run_hf)(
            job, data * work["steps"], clock
        )
        lengths = [len(row["input_ids"]) for row in data]
        counts = {
            "tokens": total,
            "targets": sum(label >= 0 for row in data for label in row["labels"]),
        }
        counts["squares"] = sum(length**2 for length in lengths)
        counts |= {key: facts[key] for key in counts if key in facts}
        counts["squares"] *= (
            counts["tokens"] / total
        )  # TRL's packs hold a little more or less than one step of rows
        # A record that is read while the next step computes ends with the step before; the last one
        # holds two steps.
        measured = clock.wall[WARM_UP : -1 if cuda else None] if ours else clock.wall[-1:]
    return {**facts, **counts, "wall": sum(measured) / len(measured), "peak": peers.peak_memory()}


if __name__ == "__main__":
    main()
