"""Models that cannot be packed: right-padded batches of like lengths against one example at a time,
in one process on a CPU.

    python bench/hybrids.py                    # all shapes, GSM8K rows, a few minutes
    python bench/hybrids.py --shape mamba-like --examples 64 --json out.json

Rows are those of GSM8K (../shared/data/gsm8k, tokens of gpt2), as ids below the shape's vocabulary;
weights are random. Both ways train the same steps in turn, and compute the same gradient, which is
compared. `alone` is one example at a time by transformers' own code, the whole of it (as sftx did
before it had batches): every logit, and Mamba's scan as transformers computes it without kernels.
`padded` is what a run does now. Figures are CPU-seconds (forward and backward), medians over rounds;
ratios are taken within a round. The last line sums them up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

from sftx.data.pack import Bins, batch_tokens, build_pack, like_lengths, probe_pack
from sftx.model.checks.start import check_paths
from sftx.model.fallbacks import own_fallbacks
from sftx.model.pack_loss import PackLoss, Paths, to_tensors
from sftx.types import Example

SHARED = Path(__file__).parents[2] / "shared" / "data"
CAPACITY = 1024  # tokens of a pack, as a run on a CPU takes
SHAPES: dict[str, dict[str, Any]] = {
    # A quarter of Qwen3.5-0.8B's width, its kinds of layers and its share of the head.
    "qwen3.5-like": {
        "family": "Qwen3_5Text",
        "vocab_size": 50304,
        "hidden_size": 384,
        "intermediate_size": 1280,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 48,
        "linear_value_head_dim": 48,
        "tie_word_embeddings": True,
    },
    # So narrow that what is computed for each layer and example counts more than products.
    "qwen3.5-tiny": {
        "family": "Qwen3_5Text",
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "tie_word_embeddings": True,
    },
    # Two thirds of Mamba-130m's width and a sixth of its layers: one example at a time they take long.
    "mamba-like": {
        "family": "Mamba",
        "vocab_size": 50304,
        "hidden_size": 512,
        "state_size": 16,
        "num_hidden_layers": 4,
    },
}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=[*SHAPES], choices=SHAPES)
    parser.add_argument("--examples", type=int, default=16, help="of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    figures = {shape: measure(args, shape) for shape in args.shape}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    parts = [
        f"{shape}={found['ratio']:.2f} ({found['alone']:.0f} -> {found['padded']:.0f} tok/cpu-s, "
        f"{100 * found['padding']:.1f} % padding)"
        for shape, found in figures.items()
    ]
    print("speedup", "; ".join(parts))


def measure(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Both ways in turn, a step of other rows each round; after a short one that does not count."""
    loss, vocabulary = model(shape), SHAPES[shape]["vocab_size"]
    steps = [rows(2, 0, vocabulary)]
    for number in range(args.rounds):
        steps.append(rows(args.examples, number * args.examples, vocabulary))
    print(
        f"{shape}: {sum(p.numel() for p in loss.parameters()) / 1e6:.0f} M parameters", flush=True
    )
    began = time.process_time()
    for note in check_paths(loss, probe_pack(steps[0]), torch.float32, 512, CAPACITY):
        print(f"  {note}")
    print(f"  checked in {time.process_time() - began:.1f} CPU-seconds", flush=True)
    ways = {"alone": Paths(isolate=False), "padded": loss.paths}
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    apart, tokens, padded = 0.0, 0, 0
    for number, data in enumerate(steps):
        lengths = np.array([len(example.ids) for example in data])
        bins: dict[str, Bins] = {
            "alone": [(i,) for i in range(len(data))],
            "padded": like_lengths(lengths, CAPACITY)[0],
        }
        gradients = []
        for way, paths in ways.items():
            loss.take(paths)
            seconds = step(loss, [[data[i] for i in members] for members in bins[way]], way)
            found = [p.grad.flatten() for p in loss.parameters() if p.grad is not None]
            gradients.append(torch.cat(found))
            if number:
                speeds[way].append(float(lengths.sum()) / seconds)
        if not number:
            continue
        apart = max(apart, float((gradients[0] - gradients[1]).norm() / gradients[0].norm()))
        tokens += int(lengths.sum())
        padded += sum(batch_tokens(lengths, members) for members in bins["padded"])
        print(f"  round {number}: {speeds}", flush=True)
    ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
    print(f"  gradients differ by {apart:.1e}")
    medians = {way: statistics.median(found) for way, found in speeds.items()}
    figures: dict[str, Any] = {**medians, "ratio": ratio, "padding": 1 - tokens / padded}
    return {**figures, "apart": apart, "speeds": speeds}


def model(shape: str) -> PackLoss:
    """The shape with random weights."""
    settings = dict(SHAPES[shape])
    config = getattr(transformers, f"{settings.pop('family')}Config")(**settings)
    torch.manual_seed(0)
    return PackLoss(transformers.AutoModelForCausalLM.from_config(config).float()).train()


def rows(count: int, first: int, vocabulary: int) -> list[Example]:
    """Questions and answers of GSM8K from row `first` on; the answers are targets."""
    tokenizer = Tokenizer.from_file(str(SHARED / "tokenizers" / "gpt2" / "tokenizer.json"))
    lines = (SHARED / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").split("\n")
    made = []
    for line in lines[first : first + count]:
        row = json.loads(line)
        question, answer = (tokenizer.encode(row[name]).ids for name in ("prompt", "completion"))
        ids = np.array(question + answer, np.int32) % vocabulary
        weights = np.zeros(len(ids), np.float32)
        weights[len(question) :] = 1
        made.append(Example(ids, weights))
    return made


def step(loss: PackLoss, packs: list[list[Example]], way: str) -> float:
    """CPU-seconds of the gradient of one step."""
    loss.zero_grad()
    tensors = [to_tensors(build_pack(examples), torch.device("cpu")) for examples in packs]
    with ExitStack() as stack:
        if way == "alone":
            stack.enter_context(own_fallbacks())
        began = time.process_time()
        for pack in tensors:
            loss(pack).backward()
        return time.process_time() - began


if __name__ == "__main__":
    main()
