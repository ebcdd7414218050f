"""Speed and memory on a CPU, against TRL and transformers, side by side in one run.

    pip install '.[bench]'
    python bench/cpu.py                            # SmolLM2-135M, all weights, fp32 and bf16
    python bench/cpu.py --shape qwen3-0.6b --rows sft_mix --method full lora --json out.json
    python bench/cpu.py --systems sftx trl-packing --rounds 1 --steps 3      # a quick look

torchtune 0.6.1 needs an old torchao, so it has an environment of its own (what it runs:
`torchtune_peer.py`):

    python -m venv tune
    tune/bin/pip install torch==2.13.0 torchtune==0.6.1 torchao==0.10.0
    python bench/cpu.py --systems sftx torchtune --torchtune-python tune/bin/python

Systems run in turn, each in a process of its own, several times over; figures are medians, ratios
are taken pair by pair within a round. Both wall and CPU seconds are shown: on a busy machine the
second is the fairer one. The matmul limit is what the same machine does on the model's own matrix
sizes in the same minutes, in the same precision.

`sftx` is a run of a few steps; `sftx-compiled` the same with the layers compiled and the larger
packs that go with it, as sftx chooses by itself for runs of more than about five minutes.
`trl-packing-compiled` is TRL with `torch_compile`.

The last line sums up the first shape, rows and method: tokens per CPU-second of the best set-up of
sftx against TRL's best, in each precision; then, in fp32 where it was measured, the share of the
matmul limit and the peak memory of the one against the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import LENGTHS, SHAPES, folder, rows

SYSTEMS = ("sftx", "sftx-compiled", "trl", "trl-packing", "transformers")
ON_WISH = ("trl-packing-compiled", "torchtune")
COMPILED = "-compiled"
PACK = 1024  # tokens per pack of TRL's packing
HEADER = ("system", "tok/cpu-s", "tok/s", "target/s", "peak MiB", "loss 1", "grad norm")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=["smollm2-135m"], choices=SHAPES)
    parser.add_argument("--rows", nargs="+", default=["gsm8k"], choices=LENGTHS)
    parser.add_argument("--method", nargs="+", default=["full"], choices=["full", "lora"])
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"]
    )
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=[*SYSTEMS, *ON_WISH])
    parser.add_argument(
        "--torchtune-python", type=Path, help="the Python of an environment with torchtune"
    )
    parser.add_argument("--batch", type=int, default=8, help="examples per step")
    parser.add_argument(
        "--steps", type=int, default=4, help="steps per process; the first is warm-up"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens-per-pack", type=int, help="of sftx; default: its own choice")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    if "torchtune" in args.systems and not (
        args.torchtune_python and args.torchtune_python.is_file()
    ):
        parser.error(
            "torchtune needs --torchtune-python, the Python of an environment made as --help says"
        )
    figures: list[dict[str, Any]] = []
    for shape, kind, method, precision in itertools.product(
        args.shape, args.rows, args.method, args.precision
    ):
        case = {"shape": shape, "rows": kind, "method": method, "precision": precision}
        rounds = [measure(args, case) for _ in range(args.rounds)]
        figures.append({**case, "rounds": rounds, "summary": report(args, case, rounds)})
        if args.json:  # after every case: a run may be stopped
            args.json.write_text(json.dumps(figures, indent=1))
    print(last_line(figures))


def last_line(figures: list[dict[str, Any]]) -> str:
    """The summary of the first shape, rows and method."""
    alike = [
        f for f in figures if all(f[key] == figures[0][key] for key in ("shape", "rows", "method"))
    ]
    by_precision = {f["precision"]: f["summary"] for f in alike}
    best_known = by_precision.get("fp32", alike[0]["summary"])
    speeds = [f"{name}={summary['speed']:.2f}" for name, summary in by_precision.items()]
    rest = [f"matmul_share={best_known['matmul']:.2f}", f"memory={best_known['memory']:.2f}"]
    return " ".join(["speedup", *speeds, *rest])


def measure(args: argparse.Namespace, case: dict[str, str]) -> dict[str, Any]:
    """One round: every system once, and the matmul limit."""
    found: dict[str, Any] = {"limit": matmul_limit(case["shape"], args.threads, case["precision"])}
    home = Path(tempfile.gettempdir()) / "sftx-bench"
    data = rows(args.batch, SHAPES[case["shape"]]["vocab_size"], longest=PACK, kind=case["rows"])
    packs = max(1, round(sum(len(row["input_ids"]) for row in data) / PACK))
    for system in args.systems:
        with tempfile.TemporaryDirectory() as scratch:
            job = {
                **case,
                "system": system.removesuffix(COMPILED),
                "model": folder(case["shape"], home),
                "batch": args.batch,
                "steps": args.steps,
                "threads": args.threads,
                "length": PACK,
                "pack_length": PACK,
                "pack_steps": packs,
                "tokens_per_pack": args.tokens_per_pack,
                "output": f"{scratch}/run",
                "cache": f"{scratch}/cache",
                "compile": "on" if system.endswith(COMPILED) else "off",
            }
            python, file = sys.executable, "peers.py"
            if system == "torchtune":
                python, file = str(args.torchtune_python), "torchtune_peer.py"
            command = [python, str(Path(__file__).parent / file), json.dumps(job)]
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment(args.threads), check=False
            )
            if done.returncode:
                sys.exit(f"{system} failed:\n{done.stderr[-3000:]}")
            found[system] = json.loads(done.stdout.strip().split("\n")[-1])
    return found


def environment(threads: int) -> dict[str, str]:
    """The caller's, with as many threads for everybody."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def matmul_limit(shape: str, threads: int, precision: str) -> float:
    """FLOP per CPU-second of this machine on products of the model's sizes."""
    import torch

    size = SHAPES[shape]
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a = torch.randn(1024, size["hidden_size"]).to(dtype)
    b = torch.randn(size["hidden_size"], size["intermediate_size"]).to(dtype)
    torch.matmul(a, b)
    count = max(1, int(2e10 / (2 * a.numel() * b.shape[1])))
    start = time.process_time()
    for _ in range(count):
        torch.matmul(a, b)
    return count * 2 * a.numel() * b.shape[1] / (time.process_time() - start)


def flops(shape: str, method: str, tokens: float, targets: float) -> float:
    """Matrix FLOPs that a step cannot avoid: 6 (LoRA: 4) per weight of the body and token, of the
    head and target.
    """
    s = SHAPES[shape]
    head = s.get("head_dim", s["hidden_size"] // s["num_attention_heads"])
    q, kv = s["num_attention_heads"] * head, s["num_key_value_heads"] * head
    body = s["num_hidden_layers"] * (
        2 * s["hidden_size"] * (q + kv) + 3 * s["hidden_size"] * s["intermediate_size"]
    )
    return (6 if method == "full" else 4) * (
        body * tokens + s["hidden_size"] * s["vocab_size"] * targets
    )


def report(
    args: argparse.Namespace, case: dict[str, str], rounds: list[dict[str, Any]]
) -> dict[str, float]:
    """Print the table of medians; returns the ratios against the better set-up of TRL."""
    print(f"\n{' '.join(case.values())}: {args.batch} examples per step, {args.threads} thread(s), "
          f"medians of {args.rounds} round(s)")  # fmt: skip
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    speed: dict[str, list[float]] = {}
    for system in args.systems:
        runs = [r[system] for r in rounds]
        speed[system] = [run["tokens"] / statistics.median(run["cpu"][1:]) for run in runs]
        wall = statistics.median(run["tokens"] / statistics.median(run["wall"][1:]) for run in runs)
        share, peak = (
            runs[0]["targets"] / runs[0]["tokens"],
            statistics.median(run["peak"] for run in runs) / 2**20,
        )
        print(
            f"| {system} | {statistics.median(speed[system]):.1f} | {wall:.1f} | "
            f"{wall * share:.1f} | {peak:.0f} | "
            f"{runs[0]['loss']:.6f} | {runs[0]['grad_norm']:.5f} |"
        )
    mine = best_of("sftx", speed)
    if mine is None:
        return dict.fromkeys(("speed", "matmul", "memory"), float("nan"))
    ours = [r[mine] for r in rounds]
    work = [flops(case["shape"], case["method"], r["tokens"], r["targets"]) for r in ours]
    used = [w / statistics.median(r["cpu"][1:]) / round_["limit"] for w, r, round_ in zip(work, ours, rounds, strict=True)]  # noqa: E501  # fmt: skip
    summary = {"speed": float("nan"), "matmul": statistics.median(used), "memory": float("nan")}
    print(
        f"\n{mine}: {100 * summary['matmul']:.0f} % of the matmul limit, "
        f"{statistics.median(r['limit'] for r in rounds) / 1e9:.0f} GFLOP per CPU-second"
    )
    if best := best_of("trl", speed):
        summary["speed"] = statistics.median(
            a / b for a, b in zip(speed[mine], speed[best], strict=True)
        )
        summary["memory"] = statistics.median(r[mine]["peak"] / r[best]["peak"] for r in rounds)
        ceiling = summary["speed"] / summary["matmul"]
        print(f"against {best}: {summary['speed']:.2f} times the tokens per CPU-second (products "
              "alone, nothing else "
              f"computed: {ceiling:.2f}), {summary['memory']:.2f} of its memory")  # fmt: skip
    for system in ("trl", "torchtune"):
        if system in args.systems:
            theirs = rounds[0][system]["loss"]
            print(f"first loss against {system}: {abs(ours[0]['loss'] / theirs - 1):.1e} relative")
    return summary


def best_of(prefix: str, speed: dict[str, list[float]]) -> str | None:
    """The fastest system whose name begins so; None without any."""
    return max(
        (s for s in speed if s.startswith(prefix)),
        key=lambda s: statistics.median(speed[s]),
        default=None,
    )


if __name__ == "__main__":
    main()
