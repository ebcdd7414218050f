"""Predicted against measured peak memory of real runs on this machine.

    # Two shapes, all weights and LoRA, fp32 and bf16, recomputed or not
    python bench/memory.py
    python bench/memory.py --recompute none --compile on
    python bench/memory.py --shape small --json out.json
    python bench/memory.py --shape qwen3.5-like mamba-like --precision fp32  # in padded batches

Each set-up is a process of its own that takes three steps through `sftx.steps`. Measured is the
peak of what the process holds (a GPU: of what PyTorch allocated) over its steps, in MiB; `base` is
what it held before the model was loaded. Exit code 1 where a prediction is more than 15 % off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hybrids import SHAPES as HYBRIDS
from peers import SHAPES, folder, rows

SHAPES.update(HYBRIDS)
SHAPES["small"] = {
    "family": "Qwen3",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=["small", "smollm2-135m"], choices=SHAPES)
    parser.add_argument(
        "--method", nargs="+", default=["none", "lora"], choices=["none", "lora", "rslora", "dora"]
    )
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"]
    )
    parser.add_argument("--recompute", nargs="+", default=["none", "4", "all"])
    parser.add_argument("--compile", nargs="+", default=["off"], choices=["off", "on"])
    parser.add_argument("--tokens", type=int, default=1024, help="per pack")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return measure(json.loads(args.job))
    figures, worst = [], 0.0
    head = f"{'shape':14}{'adapter':8}{'dtype':6}{'recompute':>10}{'compile':>8}"
    print(f"{head}{'base':>8}{'predicted':>11}{'measured':>10}  ratio")
    names = ("shape", "method", "precision", "recompute", "compile")
    for values in itertools.product(
        args.shape, args.method, args.precision, args.recompute, args.compile
    ):
        job = {**dict(zip(names, values, strict=True)), "tokens": args.tokens}
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found = json.loads(done.stdout.strip().split("\n")[-1])
        figures.append({**job, **found})
        base, predicted, measured = (found[name] / 2**20 for name in ("base", "peak", "measured"))
        ratio = predicted / measured
        worst = max(worst, abs(ratio - 1))
        shape, method, precision, layers, compiled = values
        cell = f"{shape:14}{method:8}{precision:6}{layers:>10}{compiled:>8}"
        print(f"{cell}{base:8.0f}{predicted:11.0f}{measured:10.0f}{ratio:7.3f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print(f"largest error {100 * worst:.1f} %")
    sys.exit(worst > 0.15)


def measure(job: dict[str, Any]) -> None:
    """One set-up in this process; prints its figures as JSON."""
    import sftx

    layers = job["recompute"]
    with tempfile.TemporaryDirectory() as scratch:
        data = rows(max(8, job["tokens"] // 60), SHAPES[job["shape"]]["vocab_size"], longest=1024)
        steps = sftx.steps(
            model=folder(job["shape"], Path(tempfile.gettempdir()) / "sftx-bench"),
            output=f"{scratch}/run",
            data={"rows": data, "cache": f"{scratch}/cache", "max_length": 1024},
            adapter=job["method"],
            batch={"examples_per_step": len(data), "steps": 3},
            optim={"learning_rate": 1e-5},
            runtime={
                "progress": False,
                "precision": job["precision"],
                "tokens_per_pack": job["tokens"],
                "threads": 1,
                "recompute": int(layers) if layers.isdecimal() else layers,
                "compile": job["compile"],
            },
        )
        peak = max(record.memory for record in itertools.islice(steps, 2))
        predicted = json.loads(Path(scratch, "run/run.json").read_text())["predicted"]["memory"]
    print(json.dumps({**predicted, "measured": peak}))


if __name__ == "__main__":
    main()
