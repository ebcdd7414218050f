"""Speed and memory on a CPU, against TRL and transformers, side by side in one run.

    pip install trl==1.16.0 datasets
    python bench/cpu.py                            # SmolLM2-135M, all weights, fp32: the figure of the README
    python bench/cpu.py --shape qwen3-0.6b --method lora --precision fp32 bf16 --json out.json

Systems run in turn, each in a process of its own, several times over; figures are medians, ratios are taken pair by
pair within a round. Both wall and CPU seconds are shown: on a busy machine the second is the fairer one. The matmul
limit is what the same machine does on the model's own matrix sizes in the same minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import SHAPES, folder

SYSTEMS = ("sftx", "trl", "trl-packing", "transformers")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--method", nargs="+", default=["full"], choices=["full", "lora"])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--batch", type=int, default=8, help="examples per step")
    parser.add_argument("--steps", type=int, default=4, help="steps per process; the first is warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    home = Path(tempfile.gettempdir()) / "sftx-bench"
    summary: dict[str, float] = {}
    figures = []
    for precision in args.precision:
        for method in args.method:
            rounds = [measure(args, method, precision, home) for _ in range(args.rounds)]
            figures.append({"shape": args.shape, "method": method, "precision": precision, "rounds": rounds})
            ratios = report(args, method, precision, rounds)
            if method == args.method[0]:
                summary[precision] = ratios["speed"]
                if precision == "fp32":
                    summary |= {"matmul_share": ratios["matmul"], "memory": ratios["memory"]}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print("speedup " + " ".join(f"{name}={value:.2f}" for name, value in summary.items()))


def measure(args: argparse.Namespace, method: str, precision: str, home: Path) -> dict[str, Any]:
    """One round: every system once, and the matmul limit."""
    found: dict[str, Any] = {"limit": matmul_limit(args.shape, args.threads)}
    for system in args.systems:
        with tempfile.TemporaryDirectory() as scratch:
            job = {
                "system": system, "shape": args.shape, "model": folder(args.shape, home), "method": method,
                "precision": precision, "batch": args.batch, "steps": args.steps, "threads": args.threads,
                "length": 1024, "pack_length": 1024, "pack_steps": max(1, round(args.batch * 165 / 1024)),
                "output": f"{scratch}/run", "cache": f"{scratch}/cache",
            }  # fmt: skip
            command = [sys.executable, str(Path(__file__).parent / "peers.py"), json.dumps(job)]
            done = subprocess.run(command, capture_output=True, text=True, env={**environment(args.threads)})
            if done.returncode:
                sys.exit(f"{system} failed:\n{done.stderr[-3000:]}")
            found[system] = json.loads(done.stdout.strip().split("\n")[-1])
    return found


def environment(threads: int) -> dict[str, str]:
    """The caller's, with as many threads for everybody."""
    import os

    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def matmul_limit(shape: str, threads: int) -> float:
    """fp32 FLOP per CPU-second of this machine on products of the model's sizes."""
    import torch

    size = SHAPES[shape]
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")
    a, b = torch.randn(1024, size["hidden_size"]), torch.randn(size["hidden_size"], size["intermediate_size"])
    a @ b
    count = max(1, int(2e10 / (2 * a.numel() * b.shape[1])))
    start = time.process_time()
    for _ in range(count):
        a @ b
    return count * 2 * a.numel() * b.shape[1] / (time.process_time() - start)


def flops(shape: str, method: str, tokens: float, targets: float) -> float:
    """Matrix FLOPs that a step cannot avoid: 6 (LoRA: 4) per weight of the body and token, of the head and target."""
    s = SHAPES[shape]
    head = s.get("head_dim", s["hidden_size"] // s["num_attention_heads"])
    q, kv = s["num_attention_heads"] * head, s["num_key_value_heads"] * head
    body = s["num_hidden_layers"] * (2 * s["hidden_size"] * (q + kv) + 3 * s["hidden_size"] * s["intermediate_size"])
    return (6 if method == "full" else 4) * (body * tokens + s["hidden_size"] * s["vocab_size"] * targets)


def report(args: argparse.Namespace, method: str, precision: str, rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Print the table of medians; returns the ratios against the best TRL set-up."""
    print(f"\n{args.shape} {method} {precision}, {args.batch} examples per step, {args.threads} thread(s)")
    print(
        f"{'system':14} {'tok/cpu-s':>10} {'tok/s':>9} {'target/s':>9} {'peak MiB':>9} {'loss 1':>10} {'grad norm':>10}"
    )
    speed: dict[str, list[float]] = {}
    for system in args.systems:
        runs = [r[system] for r in rounds]
        speed[system] = [run["tokens"] / statistics.median(run["cpu"][1:]) for run in runs]
        wall = statistics.median(run["tokens"] / statistics.median(run["wall"][1:]) for run in runs)
        share, peak = runs[0]["targets"] / runs[0]["tokens"], statistics.median(run["peak"] for run in runs) / 2**20
        print(
            f"{system:14} {statistics.median(speed[system]):10.1f} {wall:9.1f} {wall * share:9.1f} {peak:9.0f} "
            f"{runs[0]['loss']:10.6f} {runs[0]['grad_norm']:10.5f}"
        )
    ours = [r["sftx"] for r in rounds]
    used = [flops(args.shape, method, r["tokens"], r["targets"]) / statistics.median(r["cpu"][1:]) for r in ours]
    matmul = statistics.median(u / r["limit"] for u, r in zip(used, rounds, strict=True))
    rivals = [s for s in args.systems if s.startswith("trl")]
    if not rivals:
        return {"speed": float("nan"), "matmul": matmul, "memory": float("nan")}
    best = max(rivals, key=lambda s: statistics.median(speed[s]))
    ratio = statistics.median(a / b for a, b in zip(speed["sftx"], speed[best], strict=True))
    memory = statistics.median(r["sftx"]["peak"] / r[best]["peak"] for r in rounds)
    print(f"against {best}: {ratio:.2f} times the tokens per CPU-second, {memory:.2f} of its memory; "
          f"{100 * matmul:.0f} % of the fp32 matmul limit")  # fmt: skip
    return {"speed": ratio, "matmul": matmul, "memory": memory}


if __name__ == "__main__":
    main()
