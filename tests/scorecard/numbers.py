"""Checks 1 to 6: the numbers do not depend on how the work is cut up."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file

import sftx
from scorecard.frame import check, expect
from scorecard.runs import digest, facts, records, run, run_ranks, settings, shape, write_rows
from sftx.data.pack import build_pack
from sftx.model.pack_loss import PackLoss, TensorPack, to_tensors
from sftx.training import loop
from sftx.types import Example

Gradients = dict[str, torch.Tensor]
LENGTHS = (1, 2, 3, 5, 10, 40, 100, 180, 7, 64, 20)
"""Characters of the completions: a step of 8 very unequal examples, and a last one of 3."""


@contextmanager
def gradients_of_steps() -> Iterator[list[Gradients]]:
    """Inside, the gradients that every step hands to the optimiser are collected."""
    seen: list[Gradients] = []
    original = loop.train_step

    def watched(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        def keep(*_: Any) -> None:
            found = {}
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    grad: Any = parameter.grad.detach()
                    found[name] = (
                        grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
                    )
            seen.append(found)

        handle = optimizer.register_step_pre_hook(keep)
        try:
            return original(model, optimizer, *args, **kwargs)
        finally:
            handle.remove()

    loop.train_step = watched
    try:
        yield seen
    finally:
        loop.train_step = original


def difference(one: Gradients, other: Gradients) -> float:
    """Relative L2 difference over all parameters, in float64."""
    expect(one.keys() == other.keys(), "gradients of other parameters")
    off = sum(float(((one[n].double() - other[n].double()) ** 2).sum()) for n in one)
    return (off / sum(float((other[n].double() ** 2).sum()) for n in other)) ** 0.5


def unequal(folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    """Two steps over the unequal rows, at a learning rate that moves nothing."""
    rng = random.Random(1)
    rows = [
        {"prompt": tiny.text(rng, 12), "completion": tiny.text(rng, length)} for length in LENGTHS
    ]
    path = write_rows(folder / "unequal.jsonl", rows)
    given: dict[str, Any] = {
        "data": {"train": path, "template": "none"},
        "batch": {"examples_per_step": 8, "epochs": 1, "shuffle": False},
        "optim": {"learning_rate": 1e-30, "max_grad_norm": 0.0},
        "checkpoint": {"every": 0},
    }
    merged = {
        key: {**given.get(key, {}), **changes.get(key, {})} for key in given.keys() | changes.keys()
    }
    config = settings(folder, output, dropout=0.0, **merged)
    config["batch"].pop("steps", None)
    config["runtime"]["progress"] = False
    return config


def gradients(config: dict[str, Any]) -> list[Gradients]:
    """Train here and return the gradients of every step."""
    with gradients_of_steps() as seen:
        sftx.train(**config)
    return seen


@check(1, "Accumulation invariance", limit=90, quick=True)
def accumulation(folder: Path) -> str:
    """One step's gradient is the same (1e-6) in 1, 2, 4 and 8 micro-batches, the last incomplete
    step included.
    """
    found: dict[int, list[Gradients]] = {}
    for size in (100_000, 300, 240, 120, 1):
        config = unequal(folder, f"run-{size}", runtime={"tokens_per_pack": size})
        steps = gradients(config)
        found[records(config)[0]["packs"]] = steps
    expect(
        len(found) >= 4 and {1, 8} <= found.keys(),
        f"the step was only cut into {sorted(found)} micro-batches",
    )
    worst = max(difference(steps[i], found[1][i]) for steps in found.values() for i in range(2))
    expect(worst <= 1e-6, f"gradients differ by {worst:.2g}")
    return (
        f"worst relative L2 {worst:.1e} over {sorted(found)} micro-batches, full and "
        "incomplete step"
    )


@check(2, "fp64 reference", limit=60, quick=True)
def reference(folder: Path) -> str:
    """Loss (1e-6) and every gradient tensor (2e-6) equal sum(CE) / targets, computed in float64 by
    other code.
    """
    config = unequal(folder, "run")
    ours = gradients(config)[0]
    model = tiny.model(**shape()).double()
    tokenizer = tiny.tokenizer()
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for line in Path(config["data"]["train"]).read_text().splitlines()[:8]:
        row = json.loads(line)
        prompt, answer = (
            tokenizer(row[key], add_special_tokens=False)["input_ids"]
            for key in ("prompt", "completion")
        )
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(
            logits, ids[0, len(prompt) :], reduction="sum"
        )
        targets += len(answer) + 1
    loss = total / targets
    loss.backward()
    theirs = {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    first = records(config)[0]
    expect(first["targets"] == targets, f"{first['targets']} targets instead of {targets}")
    off = abs(first["loss"] / loss.item() - 1)
    worst = max(difference({n: ours[n]}, {n: theirs[n]}) for n in theirs)
    expect(off <= 1e-6 and worst <= 2e-6, f"loss off by {off:.2g}, worst tensor by {worst:.2g}")
    return f"loss off by {off:.1e}, worst of {len(theirs)} tensors by {worst:.1e}"


@check(3, "Rank invariance", limit=240)
def ranks(folder: Path) -> str:
    """Two processes compute the loss and gradient of one (1e-6), whole or in shards, in one pack or
    many.
    """
    alone = gradients(unequal(folder, "alone"))
    expected = records(unequal(folder, "alone"))
    worst = 0.0
    for size, parallel in ((100_000, "replicate"), (1, "replicate"), (100_000, "fsdp")):
        config = unequal(
            folder, f"{parallel}-{size}", runtime={"tokens_per_pack": size, "parallel": parallel}
        )
        run_ranks(config, fault=f"gradients:{folder / 'two.safetensors'}")
        both = load_file(folder / "two.safetensors")
        for i, step in enumerate(alone):
            worst = max(worst, difference({name: both[f"{i}/{name}"] for name in step}, step))
            worst = max(worst, abs(records(config)[i]["loss"] / expected[i]["loss"] - 1))
    expect(worst <= 1e-6, f"two ranks differ from one by {worst:.2g}")
    return (
        f"worst relative difference {worst:.1e}: replicated in one and in many packs, and in shards"
    )


@check(4, "Packing parity and leak", limit=60, quick=True)
def packing(folder: Path) -> str:
    """Packed documents have the loss they have alone (1e-6) and do not see each other (exactly
    0.0).

    Rows that are packs made elsewhere (positions that start anew) are refused.
    """
    rng = random.Random(0)
    documents = [[rng.randrange(8, 264) for _ in range(length)] for length in (20, 33, 7)]
    model = tiny.model(**shape())
    loss = PackLoss(model)

    def packed(some: list[list[int]]) -> TensorPack:
        weights = [torch.ones(len(ids)).numpy() for ids in some]
        examples = [
            Example(torch.tensor(ids, dtype=torch.int32).numpy(), w)
            for ids, w in zip(some, weights, strict=True)
        ]
        return to_tensors(build_pack(examples), torch.device("cpu"))

    together = loss(packed(documents)).item()
    off = abs(together - sum(loss(packed([ids])).item() for ids in documents)) / together
    changed = [[documents[0][0] ^ 1, *documents[0][1:]], *documents[1:]]
    hidden = [loss.hidden(packed(some)) for some in (documents, changed)]
    leak, seen = (
        float((hidden[0] - hidden[1])[part].abs().max()) for part in (slice(20, None), slice(0, 20))
    )
    expect(
        off <= 1e-6 and leak == 0.0 and seen > 0,
        f"packed loss off by {off:.2g}, leak {leak:.2g}, own change {seen:.2g}",
    )
    rows = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "position_ids": [0, 1, 0, 1]}]
    config = settings(folder, data={"train": write_rows(folder / "packs.jsonl", rows)})
    text = run(config, code=2)
    expect("pack of several documents" in text, f"a pack made elsewhere: {text}")
    return f"packed loss off by {off:.1e}, leak {leak}, packs made elsewhere refused"


def reported(config: dict[str, Any]) -> list[dict[str, float]]:
    """All numbers of a run that describe its mathematics: of every step, and of every evaluation."""
    names = (
        "loss",
        "grad_norm",
        "tokens",
        "targets",
        "weight",
        "epoch",
        "total_tokens",
        "total_targets",
    )
    steps = records(config)
    told = facts(config)
    evaluations = [
        told["eval_before"],
        told["eval_after"],
        *(step["eval"] for step in steps if step["eval"]),
    ]
    return [{name: step[name] for name in names} for step in steps] + evaluations


@check(5, "Metric invariance", limit=150)
def metrics(folder: Path) -> str:
    """Every number a run reports is the same (1e-6) for 1, 2, 4, 8 examples at a time, and on 2
    processes.
    """
    held = {
        "data": {"eval": write_rows(folder / "held.jsonl", tiny.pairs(9))},
        "eval": {"every": 1},
    }
    found = []
    for size in (100_000, 200, 120, 1):
        config = unequal(folder, f"run-{size}", **held, runtime={"tokens_per_pack": size})
        sftx.train(**config)
        found.append(config)
    two = unequal(folder, "two", **held)
    run_ranks(two)
    worst = 0.0
    for config in [*found, two]:
        for ours, base in zip(reported(config), reported(found[0]), strict=True):
            worst = max(worst, *(abs(ours[name] / base[name] - 1) for name in base))
    expect(worst <= 1e-6, f"the same run reports numbers that differ by {worst:.2g}")
    return f"worst relative difference of any reported number {worst:.1e}"


@check(6, "Determinism", limit=60, quick=True)
def determinism(folder: Path) -> str:
    """The same command twice, in two processes, gives the same weights to the bit, dropout on."""
    one, two = settings(folder, "one"), settings(folder, "two")
    run(one)
    run(two)
    expect(digest(one) == digest(two), "two equal runs gave different weights")
    return f"weights {digest(one)[:16]} twice"
