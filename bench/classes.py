"""Every causal language model of the installed transformers: is what sftx trains exact, and is it
packed?

    python bench/classes.py                      # all of them, about 20 minutes on one core
    python bench/classes.py llama qwen3 --json out.json

Of each class a small model with random weights is made from its own default configuration, with
windows, chunks and the like shortened to 40 tokens. Its loss and gradients over examples of up to
120 tokens, in one pack, are compared with each example alone through a fresh float64 copy of the
plain model and torch's cross-entropy. Exit code 1 where a class that sftx accepts is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sftx.data.pack import build_pack, probe_pack
from sftx.model.checks.stand_in import stand_in
from sftx.model.checks.start import check_paths
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.types import Example, UserError

LENGTHS = [120, 9, 97, 43, 110, 5]
BY_LENGTH = {
    "attention_chunk_size", "attention_window_size", "chunk_size", "floor_scale", "index_topk",
    "local_attention_window", "mamba_chunk_size", "original_max_position_embeddings", "sliding_window", "window_size",
}  # fmt: skip
"""Lengths in configurations that are shortened."""
SECONDS = 240
"""A class that takes longer counts as not tried."""


def main() -> None:
    """Parse, try every class in a process of its own, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "types", nargs="*", default=[], help="model types, such as llama; none: all"
    )
    parser.add_argument("--json", type=Path, help="write what was found here")
    args = parser.parse_args()
    context = multiprocessing.get_context(
        "fork"
    )  # everything is imported already, and one thread runs
    found: dict[str, dict[str, Any]] = {}
    for name in args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with context.Pool(1) as pool:
            try:
                found[name] = pool.apply_async(try_class, (name,)).get(SECONDS)
            except multiprocessing.TimeoutError:
                found[name] = {"verdict": "not tried", "why": f"more than {SECONDS} s"}
        facts = " ".join(str(value) for value in found[name].values())
        print(f"{name:28}{facts}", flush=True)
    counts = {
        verdict: 0 for verdict in ("packed", "one at a time", "refused", "wrong", "not tried")
    }
    for facts in found.values():
        counts[facts["verdict"]] += 1
    print(", ".join(f"{verdict}: {count}" for verdict, count in counts.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    sys.exit(counts["wrong"] > 0)


def try_class(name: str) -> dict[str, Any]:
    """What became of one class."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        model = small_model(name)
        data = examples(model.get_input_embeddings().weight.shape[0])
        value, gradients = alone_in_float64(model, data)
    except Exception as error:  # whatever a class wants that this script does not know
        return {
            "verdict": "not tried",
            "why": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}",
        }
    try:
        loss = PackLoss(model).eval()
        notes = check_paths(loss, probe_pack(data), torch.float32, max(LENGTHS), 2048)
    except UserError as error:
        return {"verdict": "refused", "why": str(error)}
    except Exception as error:
        return {"verdict": "wrong", "why": f"crashed in the checks: {error!r}"[:300]}
    weight = sum(float(example.weights[1:].astype(float).sum()) for example in data)
    total = loss(to_tensors(build_pack(data), torch.device("cpu"))) / weight
    total.backward()
    apart = squares = 0.0
    for parameter, wanted in zip(model.parameters(), gradients, strict=True):
        ours = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad.double()
        apart += float(((ours - wanted) ** 2).sum())
        squares += float((wanted**2).sum())
    errors = {
        "loss": abs(float(total.detach()) - value) / value,
        "gradient": (apart / squares) ** 0.5,
    }
    # Routers in fp32 choose otherwise than in float64 here and there: some classes are 1e-3 off
    # when all runs alone.
    right = errors["loss"] < 1e-4 and errors["gradient"] < 5e-3
    verdict = "packed" if loss.paths.isolate else "one at a time"
    return {
        "verdict": verdict if right else "wrong",
        **{k: f"{v:.1e}" for k, v in errors.items()},
        "notes": notes,
    }


def small_model(name: str) -> Any:
    """A model of the type with random weights, narrow and of few layers, and with short windows."""
    config = AutoConfig.for_model(name)
    shorten(config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config)
    small = stand_in(large)
    if small is None:
        raise ValueError("no small model could be made of the default configuration")
    return small.float()


def shorten(config: Any) -> None:
    """Let everything that goes by length do so within the examples; in place, in the sections too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shorten(value)
        elif name in BY_LENGTH and isinstance(value, int) and value > 40:
            setattr(config, name, 40)


def examples(vocabulary: int) -> list[Example]:
    """Random tokens, about half of them targets."""
    rng = np.random.RandomState(0)
    made = []
    for length in LENGTHS:
        weights = ((rng.rand(length) < 0.5) * rng.rand(length) * 2).astype(np.float32)
        weights[-1], weights[0] = 1.0, 0.0
        made.append(Example(rng.randint(3, vocabulary, length).astype(np.int32), weights))
    return made


def alone_in_float64(model: Any, data: list[Example]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients, each example alone through a fresh copy of the plain model."""
    total, weight = 0.0, sum(float(example.weights[1:].astype(float).sum()) for example in data)
    gradients = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for example in data:
        twin = copy.deepcopy(model).double().eval()
        ids = torch.tensor(example.ids.astype("int64"))[None]
        logits = twin(input_ids=ids, use_cache=False).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        value = (losses * torch.tensor(example.weights[1:].astype("float64"))).sum() / weight
        value.backward()
        total += float(value.detach())
        for kept, parameter in zip(gradients, twin.parameters(), strict=True):
            if parameter.grad is not None:
                kept += parameter.grad
    return total, gradients


if __name__ == "__main__":
    main()
