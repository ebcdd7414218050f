"""Answers of sftx against transformers' own batched `generate`, side by side in one process.

    python bench/generate.py ../shared/data/models/stories260K ../shared/data/gsm8k/test.jsonl
    python bench/generate.py MODEL ROWS --prompts 200 --new-tokens 128 --continuous

Both answer the same prompts, greedily, with the same stop tokens. `transformers` takes them as they
come, in batches of as many rows as sftx's largest; `sftx` puts those of about equal length together.
`--continuous` adds transformers' continuous batching (`generate_batch`), where the installed version
runs it on this device. Systems run in turn within a round; figures are medians over the rounds, and
ratios are taken within a round. CPU seconds are shown beside the wall clock: on a busy machine they
are the fairer ones.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from sftx.data.dataset import load_corpora
from sftx.data.encoder import Encoder
from sftx.data.tokenizer import Tokenizer
from sftx.eval.generate import Prompt, answer
from sftx.eval.questions import prompts_of
from sftx.model.load import load_model
from sftx.model.runtime import machine
from sftx.settings.keywords import DataSettings
from sftx.settings.make import make_config
from sftx.settings.schema import Runtime

System = Callable[[], list[list[int]]]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--batch", type=int, default=16, help="rows that transformers takes at once"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--continuous", action="store_true")
    args = parser.parse_args()
    with machine(Runtime(threads=1)) as here:
        model, tokenizer, prompts, stops = _load(args, here.device)
        systems: dict[str, System] = {
            "transformers": lambda: _batches(model, prompts, stops, args.new_tokens, args.batch),
            "sftx": lambda: [
                sample.ids for sample in answer(model, tokenizer, prompts, stops, args.new_tokens)
            ],
        }
        if args.continuous:
            systems["continuous"] = lambda: _continuous(model, prompts, stops, args.new_tokens)
        _compare(systems, args.rounds)


def _load(
    args: argparse.Namespace, device: torch.device
) -> tuple[Any, Tokenizer, list[Prompt], list[int]]:
    """The model, its tokenizer, prompts of the rows, and the tokens to stop at."""
    data: DataSettings = {
        "train": args.rows,
        "template": "none",
        "too_long": "drop",
        "max_length": 512,
    }
    config = make_config(model=args.model, data=data, output="unused")
    tokenizer = Tokenizer.of_model(config.model)
    encoder = Encoder(tokenizer, config.data, 512)
    corpus, _ = load_corpora(config, tokenizer, 512, encoder=encoder)
    prompts, _ = prompts_of(corpus, encoder, args.prompts, args.new_tokens, None)
    model: Any = load_model(config.model, device).eval()
    model.config.use_cache = True
    stops = {*encoder.stop_ids, *(model.generation_config.eos_token_id or ())}
    return model, tokenizer, prompts, sorted(stops)


def _config(model: Any, stops: list[int], new_tokens: int) -> Any:
    config = copy.deepcopy(model.generation_config)
    config.eos_token_id, config.pad_token_id = stops, stops[0]
    config.max_new_tokens, config.max_length = new_tokens, None
    return config


def _cut(ids: list[int], stops: list[int]) -> list[int]:
    first = next((at for at, token in enumerate(ids) if token in stops), len(ids))
    return ids[: first + 1]


def _batches(
    model: Any, prompts: list[Prompt], stops: list[int], new_tokens: int, size: int
) -> list[list[int]]:
    """transformers' batched `generate`, over the prompts in their order."""
    config, found = _config(model, stops, new_tokens), []
    for start in range(0, len(prompts), size):
        group = [prompt.ids for prompt in prompts[start : start + size]]
        longest = max(map(len, group))
        ids = torch.tensor([[stops[0]] * (longest - len(each)) + each for each in group])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in group])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
            )
        found += [_cut(row, stops) for row in out[:, longest:].tolist()]
    return found


def _continuous(
    model: Any, prompts: list[Prompt], stops: list[int], new_tokens: int
) -> list[list[int]]:
    """transformers' continuous batching."""
    config = _config(model, stops, new_tokens)
    with torch.no_grad():
        out = model.generate_batch([prompt.ids for prompt in prompts], generation_config=config)
    ordered = sorted(out.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
    return [_cut(list(each.generated_tokens), stops) for _, each in ordered]


def _compare(systems: dict[str, System], rounds: int) -> None:
    wall: dict[str, list[float]] = {name: [] for name in systems}
    cpu: dict[str, list[float]] = {name: [] for name in systems}
    said: dict[str, list[list[int]]] = {}
    for number in range(rounds + 1):  # the first warms up
        for name, system in systems.items():
            began, worked = time.perf_counter(), time.process_time()
            said[name] = system()
            if number:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - worked)
    print(f"{'system':14}{'wall s':>9}{'cpu s':>9}{'tok/cpu-s':>11}{'cpu ratio':>11}  same answers")
    for name in systems:
        tokens = sum(map(len, said[name]))
        ratios = [theirs / own for theirs, own in zip(cpu["transformers"], cpu[name], strict=True)]
        pairs = zip(said[name], said["transformers"], strict=True)
        same = sum(one == other for one, other in pairs)
        print(
            f"{name:14}{statistics.median(wall[name]):9.2f}{statistics.median(cpu[name]):9.2f}"
            f"{tokens / statistics.median(cpu[name]):11,.0f}{statistics.median(ratios):11.2f}"
            f"  {same} of {len(said[name])}"
        )


if __name__ == "__main__":
    main()
