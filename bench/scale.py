"""How work and messages of a step divide over ranks, as counts: two cores cannot show time.

    python bench/scale.py DATA TOKENIZER [--shape qwen3-0.6b] [--ranks 2 4 8 64] [--json scale.json]

**Balance**, from the plan alone, for any number of ranks: packs per rank, and per optimiser step
the largest sum of any rank over the mean of all, of tokens and of work (FLOPs of layers, head and
attention for `--shape`). Strong scaling keeps the step (`--examples-per-step`), weak scaling the
share of a rank (`--examples-per-rank`).

**Traffic**, from real runs under torchrun over gloo: every collective of a training step is seen by
its operation, and counted as the bytes that a rank has to send where nothing is wasted: (n - 1)/n
of what is gathered or scattered, twice that of what is reduced to all. Beside it stands the least
for the layout, with P the bytes of the weights in float32 and G those of the gradients: 2 G (n -
1)/n to sum gradients over n copies; (P + G)(n - 1)/n for a step in shards, every weight fetched
once; and what sums a shard's gradients over the nodes. `wire` is what the loopback device has
carried per rank, headers included; other traffic of the machine would be counted too, so for this
column:

    unshare --net sh -c "ip link set lo up && python bench/scale.py DATA TOKENIZER"
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peers import SHAPES, folder, rows

if TYPE_CHECKING:
    from sftx.settings.keywords import RuntimeSettings

SMALL = "stories260K"  # of the runs that are counted
STEPS = 3


def balance(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Imbalance over the (at most `--steps`, evenly spaced) whole steps of one epoch."""
    import torch
    import transformers

    from sftx.data.dataset import load_corpora
    from sftx.data.plan import Plan
    from sftx.data.tokenizer import Tokenizer
    from sftx.model.pack_loss import PackLoss
    from sftx.settings.make import make_config
    from sftx.settings.schema import Batch
    from sftx.training.memory_plan import set_example_cost

    config = make_config(
        model=args.tokenizer,
        output="unused",
        data={"train": args.data, "cache": str(scratch / "cache")},
    )
    corpus, _ = load_corpora(config, Tokenizer.load(args.tokenizer), 8192)
    shape = dict(SHAPES[args.shape])
    family = shape.pop("family")
    with torch.device("meta"):
        loss = PackLoss(
            transformers.AutoModelForCausalLM.from_config(
                getattr(transformers, f"{family}Config")(**shape)
            )
        )
    print(
        f"{len(corpus):,} examples, {int(corpus.lengths.sum()):,} tokens, the longest "
        f"{int(corpus.lengths.max()):,}; "
        f"work of {args.shape}; packs of {args.tokens_per_pack:,}"
    )
    found = []
    for kind in ("strong", "weak"):
        for ranks in args.ranks:
            size = args.examples_per_step if kind == "strong" else args.examples_per_rank * ranks
            plan = Plan(corpus.lengths, corpus.weights, Batch(examples_per_step=size), 0)
            set_example_cost(plan, loss, corpus.targets)
            whole = max(len(corpus) // size, 1)
            chosen = np.unique(
                np.linspace(0, whole - 1, min(whole, args.steps)).astype(int)
            ).tolist()
            dealt = [plan.packs(step, args.tokens_per_pack, ranks) for step in chosen]
            line = {
                "kind": kind,
                "ranks": ranks,
                "examples": size,
                "packs": [len(step[0]) for step in dealt],
            }
            for name, cost in (("tokens", plan.lengths), ("work", plan.work)):
                sums = [
                    np.array([sum(cost[i] for m in bins for i in m) for bins in step])
                    for step in dealt
                ]
                line[name] = [float(s.max() / s.mean() - 1) for s in sums]
            found.append(line)
            print(balance_line(line), flush=True)
    return found


def balance_line(line: dict[str, Any]) -> str:
    """Mean and worst step, in percent."""
    shown = {
        name: f"{100 * np.mean(line[name]):5.2f} (worst {100 * max(line[name]):5.2f})"
        for name in ("tokens", "work")
    }
    return (
        f"{line['kind']:6} {line['ranks']:3} ranks, {line['examples']:5} examples a step, packs "
        "per rank "
        f"{np.mean(line['packs']):5.2f}: imbalance in % of tokens {shown['tokens']}, of work "
        f"{shown['work']}"
    )


def cells(ranks: int) -> Iterator[dict[str, Any]]:
    """The runs on so many ranks: layout x what trains x whether the step or the share of a rank
    stays.
    """
    layouts = ["replicate", "fsdp"] + (["hsdp"] if ranks == 4 else [])
    for layout in layouts if ranks > 1 else ["replicate"]:
        for method in ("full", "lora"):
            for kind, size in (("strong", 32), ("weak", 8 * ranks)):
                yield {"layout": layout, "method": method, "kind": kind, "examples": size}


def traffic(counts: list[int], scratch: Path) -> list[dict[str, Any]]:
    """The cells of every number of ranks, each number in one job of torchrun."""
    folder(SMALL, scratch)
    found = []
    for ranks in counts:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            __file__,
        ]
        done = subprocess.run(
            [*command, "--part", str(scratch)], capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{ranks} ranks failed:\n{done.stderr[-3000:]}")
        for text in done.stdout.splitlines():
            if text.startswith("CELL "):
                found.append(json.loads(text[5:]))
                print(traffic_line(found[-1]), flush=True)
    return found


def traffic_line(cell: dict[str, Any]) -> str:
    """One cell in words."""
    ratio = (
        f"{cell['bytes'] / cell['least']:.2f} x the least" if cell["least"] else "nothing to send"
    )
    return (
        f"{cell['kind']:6} {cell['ranks']} ranks {cell['layout']:9} {cell['method']:4} "
        f"{cell['examples']:3} examples, "
        f"packs per rank {cell['packs']:.1f}: {cell['bytes']:10,.0f} bytes per rank and step, "
        "least "
        f"{cell['least']:10,.0f} ({ratio}), wire {cell['wire']:10,.0f}  {cell['by']}"
    )


def part(scratch: Path) -> None:
    """In a rank: run every cell and count what a step sends."""
    from torch.utils._python_dispatch import TorchDispatchMode

    import sftx
    from sftx import distributed
    from sftx.training import loop

    class Count(TorchDispatchMode):
        """Bytes that this rank has to send, by operation."""

        def __init__(self) -> None:
            super().__init__()
            self.sent: dict[str, float] = {}

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                kind, size = sent(func._schema.name.partition("::")[2], args)
                self.sent[kind] = self.sent.get(kind, 0.0) + size
            return func(*args, **(kwargs or {}))

    counted: list[dict[str, Any]] = []
    own = loop.train_step

    def train_step(loss: Any, optimizer: Any, packs: Any, *rest: Any) -> Any:
        distributed.barrier()
        before, count = carried(), Count()
        with count:
            result = own(loss, optimizer, packs, *rest)
        distributed.barrier()
        sizes = [
            sum(p.numel() * 4 for p in loss.parameters() if p.requires_grad or every)
            for every in (True, False)
        ]
        counted.append(
            {"sent": count.sent, "wire": carried() - before, "packs": len(packs), "sizes": sizes}
        )
        return result

    loop.train_step = train_step
    ranks = distributed.world_size()
    data = rows(64, SHAPES[SMALL]["vocab_size"], longest=1024, kind="sft_mix")
    for cell in cells(ranks):
        counted.clear()
        if cell["layout"] == "hsdp":
            os.environ["LOCAL_WORLD_SIZE"] = "2"  # as if on two nodes of two
        run = scratch / f"{ranks}-{'-'.join(map(str, cell.values()))}"
        runtime: RuntimeSettings = {
            "parallel": cell["layout"],
            "device": "cpu",
            "progress": False,
            "threads": 1,
            "tokens_per_pack": 1024,
            "precision": "fp32",
        }
        for _ in sftx.steps(
            model=str(scratch / SMALL),
            output=str(run),
            data={"rows": data, "cache": str(scratch / "small")},
            batch={"examples_per_step": cell["examples"], "steps": STEPS},
            runtime=runtime,
            adapter={"method": "lora" if cell["method"] == "lora" else "none"},
        ):
            pass
        kinds = sorted({kind for step in counted for kind in step["sent"]})
        by = {
            kind: round(sum(step["sent"].get(kind, 0.0) for step in counted) / STEPS)
            for kind in kinds
        }
        weights, gradients = counted[0]["sizes"]
        facts = {
            "ranks": ranks,
            "bytes": sum(by.values()),
            "by": by,
            "least": least(cell, ranks, weights, gradients),
        }
        facts |= {name: sum(step[name] for step in counted) / STEPS for name in ("packs", "wire")}
        facts["wire"] /= ranks
        if distributed.is_main():
            print("\nCELL " + json.dumps({**cell, **facts}), flush=True)


def least(cell: dict[str, Any], ranks: int, weights: float, gradients: float) -> float:
    """The least bytes that a rank sends per step; see the module."""
    shards = {"replicate": 1, "fsdp": ranks, "hsdp": ranks // 2}[cell["layout"]]
    copies = ranks // shards
    within = (weights + gradients) * (shards - 1) / shards
    return within + 2 * gradients / shards * (copies - 1) / copies


def sent(name: str, args: Any) -> tuple[str, float]:
    """What a collective is, and the bytes that a rank sends for it; `args` as PyTorch's operation
    takes them.
    """
    import torch
    from torch.distributed import distributed_c10d
    from torch.distributed.distributed_c10d import ProcessGroup
    from torch.utils import _pytree

    def bytes_of(value: Any) -> int:
        return sum(t.nbytes for t in _pytree.tree_leaves(value) if isinstance(t, torch.Tensor))

    c10d: Any = distributed_c10d  # the function has no public name
    if name == "wait_tensor":
        return "wait", 0.0
    if isinstance(args[-1], str):  # the operations that DTensor uses name their group
        size = c10d._resolve_process_group(args[-1]).size()
    else:
        group = next(
            a
            for a in args
            if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
        )
        size = ProcessGroup.unbox(group).size()
    match name:
        case "_allgather_base_":  # (output, input, ...)
            return "gather", bytes_of(args[1]) * (size - 1)
        case "_reduce_scatter_base_":
            return "scatter", bytes_of(args[1]) * (size - 1) / size
        case "allreduce_" | "all_reduce":
            return "reduce", bytes_of(args[0]) * 2 * (size - 1) / size
    raise ValueError(f"a step is not known to use {name}")


def carried() -> int:
    """Bytes the loopback device has carried."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def main() -> None:
    """Count and print; the last line holds the largest mean imbalance of work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", help="rows, in any form that sftx reads")
    parser.add_argument("tokenizer", nargs="?", help="folder of a tokenizer")
    parser.add_argument(
        "--shape", default="qwen3-0.6b", choices=SHAPES, help="model whose work is balanced"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 64])
    parser.add_argument(
        "--examples-per-step", type=int, default=1024, help="strong scaling: examples of a step"
    )
    parser.add_argument(
        "--examples-per-rank", type=int, default=16, help="weak scaling: examples of a rank"
    )
    parser.add_argument("--tokens-per-pack", type=int, default=8192)
    parser.add_argument(
        "--steps", type=int, default=100, help="steps of the plan that are looked at"
    )
    parser.add_argument(
        "--traffic",
        type=int,
        nargs="*",
        default=[1, 2, 4],
        help="ranks of the counted runs; none: no run",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--part", type=Path, help=argparse.SUPPRESS
    )  # what a rank of a counted run does
    args = parser.parse_args()
    if args.part:
        part(args.part)
        return
    if not args.tokenizer:
        parser.error("DATA and TOKENIZER are needed")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        found = {"balance": balance(args, scratch), "traffic": traffic(args.traffic, scratch)}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"scale imbalance={max(np.mean(line['work']) for line in found['balance']):.4f}")


if __name__ == "__main__":
    main()
