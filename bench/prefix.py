"""What computing shared prefixes once saves: tokens, FLOPs, time and memory on a CPU.

    python bench/prefix.py --data ../shared/data            # a, b, c and d
    python bench/prefix.py --data ../shared/data --case a d --rounds 3 --json out.json
    python bench/prefix.py --data ../shared/data --trl-path trl-site    # TRL from that folder
    python bench/prefix.py --data ../shared/data --pieces    # how short a shared piece may be
    python bench/prefix.py --planning 1000000                # what looking for prefixes costs

Four kinds of data, each one optimiser step: (a) prompts of GSM8K with 8 answers each; (b) one tool
prompt of about 2,000 tokens before 64 short dialogues; (c) a story with 10 questions; (d) dialogues
of 6 turns with reasoning, whose template strips the reasoning of earlier turns, so that each turn
is a sequence of its own.

Without and with sharing run in turn in one process, forward and backward over the packs that a run
would take; CPU seconds are medians of the rounds after one of warm-up. (b) has one layer instead of
four, on all sides: it is 115,000 tokens. Memory is what a step adds at its peak to the memory of a
process of its own that holds the model and its gradients (Linux). `saving` is the share of the FLOPs
that need not be computed, `reached` how much of it became time: (1 - t_with / t_without) / saving, of the pairs of each
round. TRL's SFTTrainer over the same rows (padded, as it does by default) is measured where it is
installed, or lies in `--trl-path`, which only its process sees.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TEMPLATE = "chat_templates/llama.cpp/Qwen-Qwen3-0.6B.jinja"
QUESTIONS = "Who is this story about?|Where does it happen?|What goes wrong?|How does it end?"


def lines_of(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def rows_of(case: str, data: Path) -> list[dict[str, Any]]:
    """The rows of one step; always the same."""
    draw = random.Random(0)
    match case:
        case "a":
            found = lines_of(data / "gsm8k" / "train.jsonl", 200)
            answers = [row["completion"] for row in found]
            return [
                {"prompt": row["prompt"], "completion": answer}
                for row in found[:4]
                for answer in draw.sample(answers, 8)
            ]
        case "b":
            system = {"role": "system", "content": tool_prompt(data)}
            found = lines_of(data / "taskmaster4" / "train.jsonl", 64)
            return [{"messages": [system, *short(row["messages"])]} for row in found]
        case "c":
            stories = lines_of(data / "tinystories" / "stories.jsonl", 40)
            story = "\n".join(row["text"] for row in stories[:4])
            questions = QUESTIONS.split("|")
            return [
                {
                    "prompt": f"{story}\n\n{i}: {questions[i % 4]}",
                    "completion": stories[10 + i]["text"][:150],
                }
                for i in range(10)
            ]
    return [{"messages": reasoning(data, k)} for k in range(2)]


def tool_prompt(data: Path) -> str:
    """About 2,000 tokens of tools, as they are put before a dialogue."""
    rows = lines_of(data / "taskmaster4" / "train.jsonl", 500)
    names = sorted({c["function"]["name"] for r in rows for m in r["messages"]
                    for c in m.get("tool_calls") or []})  # fmt: skip
    tools = [
        {
            "name": name,
            "description": f"Call {name.replace('_', ' ')} when the customer asks for it.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"},
                           "order_id": {"type": "string"}, "quantity": {"type": "integer"}}},
        }
        for name in names
    ]  # fmt: skip
    text = "You serve customers and have these tools:\n"
    return (text + "\n".join(json.dumps(tool) for tool in tools * 20))[:6600]


def short(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The first words of a dialogue and the first call in it, as texts."""
    call = next((m["tool_calls"][0]["function"] for m in messages if m.get("tool_calls")), {})
    return [
        {"role": "user", "content": str(messages[0]["content"])[:200]},
        {"role": "assistant", "content": json.dumps(call)[:200]},
    ]


def reasoning(data: Path, number: int) -> list[dict[str, str]]:
    """A dialogue of 6 turns, each with thoughts before the answer."""
    turns = lines_of(data / "gsm8k" / "train.jsonl", 40)[number * 6 : number * 6 + 6]
    messages: list[dict[str, str]] = []
    for turn in turns:
        thought = (turn["completion"] + "\n") * 3
        messages.append({"role": "user", "content": turn["prompt"]})
        messages.append(
            {
                "role": "assistant",
                "content": turn["completion"],
                "reasoning_content": thought,
            }
        )
    return messages


def prepared(case: str, data: Path) -> tuple[Any, Any, Any]:
    """The model's loss, the corpus, and the plan of its one step."""
    import torch
    import transformers

    from sftx.data.encode_row import encode
    from sftx.data.plan import Plan
    from sftx.model.pack_loss import PackLoss, Paths
    from sftx.settings.schema import Batch
    from sftx.training.memory_plan import set_example_cost

    tokenizer = str(data / "tokenizers" / "qwen3")
    examples = [
        example
        for row in rows_of(case, data)
        for example in encode(row, tokenizer, template=str(data / TEMPLATE), max_length=8192)
    ]
    lengths = np.array([len(e.ids) for e in examples], np.int32)
    targets = np.array([e.targets for e in examples], np.int32)
    weights = np.array([e.weights.sum(dtype=np.float64) for e in examples])
    plan = Plan(lengths, weights, Batch(examples_per_step=len(examples), shuffle=False), 0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Ids are folded into a small vocabulary: what is measured is the layers, not the head.
    for example in examples:
        object.__setattr__(example, "ids", (example.ids % 8192).astype(np.int32))
    config = transformers.LlamaConfig(**SHAPE, vocab_size=8192)
    if case == "b":
        config.num_hidden_layers = 1
    loss = PackLoss(transformers.AutoModelForCausalLM.from_config(config)).train()
    loss.take(Paths(shares_prefixes=True))
    set_example_cost(plan, loss, targets)
    return loss, examples, plan


def packs_of(examples: Any, plan: Any, share: bool) -> list[Any]:
    """The packs of the step: as large as a run would make them on a CPU."""
    from sftx.data.pack import build_pack
    from sftx.data.shared_packs import shared_packs

    if not share:
        return [build_pack([examples[i] for i in some], some) for some in plan.packs(0, 1024)[0]]
    known = dict(enumerate(examples))
    size = pack_size(plan, known)
    return [m.build(known.__getitem__) for m in shared_packs(plan, 0, size, 1, known)[0]]


def pack_size(plan: Any, known: dict[int, Any]) -> int:
    """What `choose_packing` takes where memory is plenty."""
    from sftx.data.shared_packs import LARGER, saving_of

    corpus: Any = SimpleNamespace(example=known.__getitem__)
    saving = saving_of(plan, corpus)
    return min(max(saving.pack_size, 1024), LARGER * 1024)


def step_seconds(loss: Any, packs: list[Any], total: float) -> tuple[float, float]:
    """CPU seconds of forward and backward over the packs, and the loss."""
    import torch

    from sftx.model.pack_loss import to_tensors

    start, value = time.process_time(), 0.0
    for pack in packs:
        part = loss(to_tensors(pack, torch.device("cpu"))) / total
        part.backward()
        value += float(part.detach())
    seconds = time.process_time() - start
    for parameter in loss.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    return seconds, value


def measure(case: str, data: Path, rounds: int | None) -> dict[str, float]:
    """The figures of one case."""
    loss, examples, plan = prepared(case, data)
    both = {name: packs_of(examples, plan, name == "with") for name in ("without", "with")}
    rounds = rounds or ROUNDS[case]
    seconds: dict[str, list[float]] = {name: [] for name in both}
    losses: dict[str, float] = {}
    step_seconds(loss, both["with"][:1], 1.0)
    for _ in range(rounds):
        for name, packs in both.items():
            took, losses[name] = step_seconds(loss, packs, plan.total_weight(0))
            seconds[name].append(took)
    work = {name: work_of(loss, packs) for name, packs in both.items()}
    median = {name: statistics.median(times) for name, times in seconds.items()}
    saving = 1 - work["with"] / work["without"]
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    share = statistics.median(a / b for a, b in pairs)
    return {
        "examples": len(examples),
        "longest": int(plan.lengths.max()),
        **{f"tokens {name}": sum(len(p.ids) for p in packs) for name, packs in both.items()},
        **{f"packs {name}": len(packs) for name, packs in both.items()},
        **{f"seconds {name}": value for name, value in median.items()},
        "saving": saving,
        "speed": 1 / share,
        "reached": (1 - share) / saving,
        "differs": abs(losses["with"] / losses["without"] - 1),
    }


def work_of(loss: Any, packs: list[Any]) -> float:
    """FLOPs of the packs: a token sees its ancestors and its own segment up to itself."""
    from sftx.model.flops import flops

    total = 0.0
    for pack in packs:
        first, last = pack.positions[pack.cu_seqlens[:-1]], pack.positions[pack.cu_seqlens[1:] - 1]
        squares = float(((last + 1.0) ** 2 - first.astype(float) ** 2).sum())
        total += flops(loss, len(pack.ids), len(pack.index), squares)
    return total


def peak(case: str, data: Path, share: bool) -> float:
    """MiB by which the peak of a process grows over a step; run in a process of its own."""
    loss, examples, plan = prepared(case, data)
    packs = sorted(packs_of(examples, plan, share), key=lambda pack: -len(pack.ids))
    loss.zero_grad()
    for parameter in loss.parameters():
        parameter.grad = parameter.detach().clone()
    step_seconds(loss, packs[-1:], 1.0)  # what libraries keep
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = resident("VmRSS")
    step_seconds(loss, packs[:2], plan.total_weight(0))
    return (resident("VmHWM") - before) / 1024


def resident(name: str) -> int:
    """KiB of this process, as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0])


def of_other_process(cell: str, case: str, data: Path, path: Path | None = None) -> float:
    """A figure that a new process measures, see `CELLS`; with `path` it finds packages there too."""
    asked = ["--cell", cell, "--case", case, "--data", str(data)]
    environment = dict(os.environ)
    if path is not None:
        known = environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join([known, str(path)])
    done = subprocess.run(
        [sys.executable, __file__, *asked], stdout=subprocess.PIPE, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{cell} of case {case} failed, see above")
    return float(done.stdout.split()[-1])


def trl_seconds(case: str, data: Path) -> float:
    """CPU seconds of a step of TRL's SFTTrainer, the second of two."""
    from peers import Clock, run_hf

    loss, examples, _ = prepared(case, data)
    rows = [
        {
            "input_ids": e.ids.tolist(),
            "labels": np.where(e.weights != 0, e.ids, -100).tolist(),
        }
        for e in examples
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        loss.use_segments(False)
        loss.model.save_pretrained(folder)
        from peers import folder as word_tokenizer

        made = Path(word_tokenizer("smoke", Path(folder)))
        for file in made.glob("token*"):
            file.rename(Path(folder) / file.name)
        job = {
            "system": "trl", "model": folder, "output": f"{folder}/out", "batch": len(rows),
            "micro_batch": 4 if len(rows) % 4 == 0 else 1, "steps": 2, "precision": "fp32",
            "threads": 1, "method": "full", "length": 8192,
        }  # fmt: skip
        run_hf(job, rows * 2, clock)
    return clock.cpu[-1]


def pieces(data: Path) -> None:
    """Print what sharing a piece of so many tokens saves: pairs of examples that have it in common,
    100 tokens behind it.
    """
    from sftx.data.prefixes import build_shared_pack
    from sftx.types import Example

    loss, _, _ = prepared("a", data)
    draw = np.random.RandomState(0)
    for length in (8, 16, 32):
        examples = []
        for _ in range(4):
            piece = draw.randint(0, 8192, length)
            for _ in range(2):
                ids = np.concatenate([piece, draw.randint(0, 8192, 100)]).astype(np.int32)
                examples.append(Example(ids, np.ones(len(ids), np.float32)))
        packs = {
            "without": [build_shared_pack(examples)],
            "with": [build_shared_pack(examples, (), (0, length) * 4)],
        }
        shares = []
        for number in range(16):
            seconds = {name: step_seconds(loss, some, 1.0)[0] for name, some in packs.items()}
            if number:
                shares.append(seconds["with"] / seconds["without"])
        saving = 1 - work_of(loss, packs["with"]) / work_of(loss, packs["without"])
        print(
            f"a piece of {length} tokens in two examples: FLOPs {saving:.1%}, "
            f"time {1 - statistics.median(shares):.1%}",
            flush=True,
        )


def planning(count: int) -> None:
    """Print what looking for prefixes costs where nothing is shared: CPU seconds of planning all
    steps of so many examples, and of laying out their packs.
    """
    from sftx.data.plan import Plan
    from sftx.data.shared_packs import packs_of_step, saving_of
    from sftx.settings.schema import Batch
    from sftx.types import Example

    draw = np.random.RandomState(0)
    lengths = draw.randint(40, 200, count).astype(np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = draw.randint(0, 50_000, int(ends[-1]), dtype=np.int32)
    ones = np.ones(200, np.float32)

    def example(i: int) -> Example:
        return Example(tokens[ends[i] - lengths[i] : ends[i]], ones[: lengths[i]])

    corpus: Any = SimpleNamespace(example=example)
    plan = Plan(lengths, lengths.astype(np.float64), Batch(examples_per_step=32), 0)
    start = time.process_time()
    saving = saving_of(plan, corpus)
    looking = time.process_time() - start
    assert not saving.saved_tokens
    print(f"{count:,} examples, {plan.num_steps:,} steps: looking whether to share {looking:.2f} s")
    for name, share in (("off", False), ("on", True)):
        start = time.process_time()
        for step in range(plan.num_steps):
            packs, read = packs_of_step(plan, corpus, step, 1024, share)
            for members in packs[0]:
                members.build(read)
        print(f"share_prefixes {name}: {time.process_time() - start:.2f} s", flush=True)


CELLS = {
    "without": lambda case, data: peak(case, data, False),
    "with": lambda case, data: peak(case, data, True),
    "trl": lambda case, data: trl_seconds(case, data),
}
ROUNDS = {"a": 5, "b": 1, "c": 4, "d": 3}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the folder of the data sets")
    parser.add_argument("--case", nargs="+", default=list("abcd"), choices=list("abcd"))
    parser.add_argument("--rounds", type=int, help="of each case; default: see ROUNDS")
    parser.add_argument("--trl-path", type=Path, help="a folder in which TRL is installed")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--pieces", action="store_true", help="only: short shared pieces")
    parser.add_argument("--planning", type=int, help="only: planning so many examples")
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.planning:
        planning(args.planning)
        return
    if args.data is None:
        parser.error("--data is needed")
    if args.pieces:
        pieces(args.data)
    elif args.cell:
        print(CELLS[args.cell](args.case[0], args.data))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Measure the cases, and print a line of each and one of all."""
    has_trl = args.trl_path is not None or find_spec("trl") is not None
    found: dict[str, dict[str, float]] = {}
    for case in args.case:
        figures = measure(case, args.data, args.rounds)
        for name in ("without", "with"):
            figures[f"MiB {name}"] = of_other_process(name, case, args.data)
        if has_trl:
            figures["seconds trl"] = of_other_process("trl", case, args.data, args.trl_path)
        found[case] = figures
        print(case, ", ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))
    if not has_trl:
        print("TRL is not installed: it was not measured")
    speeds = " ".join(f"{case}={figures['speed']:.2f}" for case, figures in found.items())
    reached = min(figures["reached"] for figures in found.values())
    print(f"prefix {speeds} saving_reached={reached:.2f}")


if __name__ == "__main__":
    main()
