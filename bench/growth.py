"""How the time of a step grows with the length of a segment and with the vocabulary, on a CPU.

    python bench/growth.py
    python bench/growth.py --lengths 256 1024 --vocabularies 1000 50000 --json growth.json

A small body (2 layers of width 128), forward and backward, CPU-seconds, the fastest of a few
repeats. `sftx` is the trainer's own path; the reference is transformers with a padded batch, its
SDPA attention and the logits of every position, under the same machine settings. Each length is a
step of one segment of that many tokens and eight of an eighth of it; in the sweep over vocabularies
segments have 512 and 64 tokens. 40 % of the tokens are targets.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sftx.data.pack import build_pack
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.model.runtime import machine
from sftx.settings.schema import Runtime
from sftx.types import Example

CPU = torch.device("cpu")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192]
    )
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", default=[1000, 10_000, 50_000, 150_000]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    figures = []
    with machine(Runtime(device="cpu", precision="fp32", threads=1)):
        for name, cases in {
            "tokens of the longest segment": [(length, 1000, length) for length in args.lengths],
            "vocabulary": [(512, size, size) for size in args.vocabularies],
        }.items():
            print(
                f"\n| {name} | sftx, s | reference, s | ratio | sftx, ms per real token "
                "|\n|---|---|---|---|---|"
            )
            for longest, vocabulary, shown in cases:
                ours, theirs, tokens = compare(longest, vocabulary, args.repeats)
                figures.append(
                    {
                        "by": name,
                        "value": shown,
                        "sftx": ours,
                        "reference": theirs,
                        "tokens": tokens,
                    }
                )
                print(
                    f"| {shown:,} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} | "
                    f"{1000 * ours / tokens:.3f} |"
                )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def compare(longest: int, vocabulary: int, repeats: int) -> tuple[float, float, int]:
    """CPU-seconds of a step by sftx and by the reference, and its real tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=vocabulary, max_position_embeddings=longest,
        )
    ).train()  # fmt: skip
    rng = np.random.RandomState(0)
    examples = []
    for length in (longest, *[longest // 8] * 8):
        weights = (np.arange(length) >= 0.6 * length).astype(np.float32)
        examples.append(Example(rng.randint(0, vocabulary, length).astype(np.int32), weights))
    total = float(sum(example.weights.sum() for example in examples))

    loss = PackLoss(model)
    pack = to_tensors(build_pack(examples), CPU)
    ours, our_loss = best(lambda: loss(pack) / total, model, repeats)
    loss.use_segments(False)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n], mask[row, :n] = torch.as_tensor(example.ids).long(), 1
        labels[row, :n] = torch.where(torch.as_tensor(example.weights) > 0, ids[row, :n], -100)
    theirs, their_loss = best(
        lambda: model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss,
        model,
        repeats,
    )
    assert abs(our_loss / their_loss - 1) < 1e-5, (our_loss, their_loss)
    return ours, theirs, sum(len(example.ids) for example in examples)


def best(
    step: Callable[[], torch.Tensor], model: torch.nn.Module, repeats: int
) -> tuple[float, float]:
    """The least CPU-seconds of forward and backward, and the loss."""
    seconds = []
    value = torch.zeros(())
    for _ in range(repeats + 1):  # the first is warm-up
        model.zero_grad()
        start = time.process_time()
        value = step()
        value.backward()
        seconds.append(time.process_time() - start)
    return min(seconds[1:]), float(value.detach())


if __name__ == "__main__":
    main()
