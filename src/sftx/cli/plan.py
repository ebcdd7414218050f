"""What a run will take, before it runs: settings, steps, tokens, memory by part, time: `sftx plan
run.yaml`.

It is the dry run: the settings that are set and the defaults that matter come first. No weights are
loaded. `sftx plan model=config.json gpus=64 gpu_memory=141GiB` needs neither data
nor a GPU: it tells what each of so many GPUs holds under `fully_shard`, whether that fits, and how
many GPUs are needed at least.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sftx.cli._inputs import encoded, tokenizer_and_length, whole_number
from sftx.cli._output import write_json
from sftx.cli._resolved import lines as resolved_lines
from sftx.cli._resolved import resolved
from sftx.data.encoder import DEFAULT_LENGTH, Encoder
from sftx.data.plan import Plan, plan_of
from sftx.data.tokenizer import Tokenizer
from sftx.eval.generation_memory import most_memory
from sftx.model.adapter import cast_frozen_weights, trainable
from sftx.model.compile import planned
from sftx.model.folder import load_config
from sftx.model.load import stored_dtype
from sftx.model.memory import MemoryEstimator
from sftx.model.mixture import describe_adapter
from sftx.model.pack_loss import PackLoss
from sftx.model.runtime import CUBLAS_WORKSPACE, machine, name_of
from sftx.printable import printable
from sftx.report.progress import working
from sftx.settings.schema import Config
from sftx.training.build import longest_example
from sftx.training.memory_plan import (
    StepProfile,
    choose_packing,
    meta_model,
    seconds_of,
    set_example_cost,
)
from sftx.training.optim import peak_learning_rate
from sftx.types import UserError

STAGE = "plan"
EXAMPLE = "sftx plan run.yaml"
EXTRA = {
    "gpus": "Plan for so many GPUs instead of this machine: weights, gradients and optimiser in "
    "shards over them.",
    "gpu_memory": "Memory of each of them, such as 141GiB or 80GB.",
    "json": "Write the figures to this file.",
}
DEFAULTS = ("output=unused", "data.format=auto")
CALIBRATION = 1024  # tokens of a layer that is timed; two seconds for a model of 0.6B on two cores
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
"""What the settings call them."""
MANY = 4096  # GPUs; more are not looked at


def run(config: Config, gpus: str = "", gpu_memory: str = "", json: str = "") -> int:
    """Print the plan. Returns 0, or 1 where the run does not fit."""
    if bool(gpus) != bool(gpu_memory):
        raise UserError("sftx plan: gpus= and gpu_memory= belong together")
    count = whole_number("plan: gpus", gpus) if gpus else 1
    added = config.model.add_tokens or config.model.add_special_tokens
    tokens = Tokenizer.of_model(config.model).added_token_ids if added else {}
    model_config = load_config(config.model)
    loss = meta_model(config, model_config, tokens)
    plan, load = _load(config, loss, count)
    shown = working("planning memory and time", config.runtime.progress)
    with machine(config.runtime) as here, shown:
        available, held = (
            (_bytes(gpu_memory), CUBLAS_WORKSPACE) if gpus else here.available_memory()
        )
        if gpus:
            half = config.runtime.precision != "fp32"
            here = replace(
                here,
                device=torch.device("cuda"),
                precision=torch.bfloat16 if half else torch.float32,
            )
        if count == 1:
            cast_frozen_weights(loss.model, here.precision)
        nf4 = config.adapter.quantize == "nf4"
        estimator = MemoryEstimator(loss, here, held, count if count > 1 else None, nf4)
        facts = _facts(config, plan, load, loss, available)
        tokens = load.tokens if count == 1 else 0.0
        estimator.compiled = planned(
            config.runtime.compile, here.device, trainable(loss)[1], tokens
        )
        facts |= {
            "adapter": describe_adapter(loss.model),
            "save_dtype": name_of(stored_dtype(config.model, model_config)),
            "device": f"{gpus} GPUs" if gpus else str(here.device),
            "precision": name_of(here.precision),
            "answers": _answers(config, loss, here.precision),
        }
        try:
            chosen = choose_packing(config.runtime, estimator, load, available)
            facts |= {
                "tokens_per_pack": chosen.tokens_per_pack,
                "recomputed_layers": chosen.recomputed,
                "layers": len(estimator.layers),
                "memory": chosen.parts(),
                "notes": list(chosen.notes),
            }
            if plan is not None and not gpus:
                facts["fill"] = _fill(plan, chosen.tokens_per_pack)
                facts["seconds"] = seconds_of(estimator, load, chosen, CALIBRATION)
        except UserError as error:
            facts["refused"] = str(error)
        if gpus:
            facts["gpus_needed"] = _fewest_gpus(config, estimator, load, available)
    facts["settings"] = resolved(config, DEFAULTS, _defaults_here(config, loss, facts))
    print(printable("\n".join([*resolved_lines(facts["settings"]), *_lines(facts, config)])))
    if json:
        write_json(json, facts)
    return 1 if "refused" in facts else 0


def _defaults_here(config: Config, loss: PackLoss, facts: dict[str, Any]) -> dict[str, object]:
    """What the defaults that depend on model and machine come to."""
    return {
        "data.max_length": longest_example(config, loss.model.config),
        "optim.learning_rate": facts["learning_rate"],
        "model.save_dtype": SHORT.get(facts["save_dtype"], facts["save_dtype"]),
        "runtime.device": facts["device"],
        "runtime.precision": SHORT.get(facts["precision"], facts["precision"]),
        "runtime.tokens_per_pack": facts.get("tokens_per_pack"),
        "runtime.recompute": facts.get("recomputed_layers"),
    }


def _bytes(value: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT])(i?)B", value)
    if not found:
        raise UserError(f"sftx plan: gpu_memory={value!r}: expected a size such as 141GiB or 80GB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2]) + 1))


def _load(config: Config, loss: PackLoss, processes: int) -> tuple[Plan | None, StepProfile]:
    """The plan of the run's own data, and its load; without data: full packs of the longest
    examples, all targets.
    """
    if config.data.train or config.data.rows:
        tokenizer, max_length = tokenizer_and_length(config)
        corpus = encoded(config, Encoder(tokenizer, config.data, max_length))
        if kinds := corpus.ledger.by_kind():
            print(printable(f"data     {kinds}"))
        plan = plan_of(corpus, config)
        set_example_cost(plan, loss, corpus.targets)
        return plan, StepProfile.of_plan(plan, int(corpus.targets.sum()), processes)
    sizes = (
        longest_example(config, loss.model.config),
        config.runtime.tokens_per_pack or DEFAULT_LENGTH,
    )
    return None, StepProfile(min(sizes), 1 << 20, 1.0)


def _facts(
    config: Config, plan: Plan | None, load: StepProfile, loss: PackLoss, available: int
) -> dict[str, Any]:
    facts: dict[str, Any] = dict(zip(("trainable", "weights"), trainable(loss), strict=True))
    facts |= {
        "memory_at_hand": available,
        "learning_rate": peak_learning_rate(config.optim, config.adapter),
    }
    if plan is not None:
        targets = round(load.tokens * load.target_share)
        facts |= {"steps": plan.num_steps, "tokens": round(load.tokens), "targets": targets}
    return facts


def _answers(config: Config, loss: PackLoss, precision: torch.dtype) -> int:
    """Bytes that answering the prompts of an evaluation takes at most; 0 where none are answered."""
    asked = config.eval.prompts
    prompts = asked if isinstance(asked, int) else MANY
    if not prompts:
        return 0
    longest = longest_example(config, loss.model.config)
    return most_memory(
        loss.model.config, prompts, longest, config.eval.new_tokens, precision.itemsize
    )


def _answers_in_words(answers: int, memory: dict[str, int], available: int) -> Iterator[str]:
    """What answering takes, and whether it fits where a step has done its work."""
    kept = sum(memory[name] for name in ("weights", "optimizer", "allocator", "base"))
    size, room = answers / 2**30, (available - kept) / 2**30
    yield f"answers  up to {size:.2f} GiB of keys, values and logits, while no step is taken"
    if size > room:
        yield (
            f"warning  {room:.2f} GiB are left for them: ask fewer eval.prompts, or take fewer "
            "eval.new_tokens"
        )


def _fill(plan: Plan, tokens_per_pack: int) -> float:
    """How full the packs of the first (at most 50) steps are."""
    bins = [
        members
        for step in range(min(plan.num_steps, 50))
        for members in plan.packs(step, tokens_per_pack)[0]
    ]
    return sum(int(plan.lengths[list(members)].sum()) for members in bins) / (
        tokens_per_pack * max(len(bins), 1)
    )


def _fewest_gpus(
    config: Config, estimator: MemoryEstimator, load: StepProfile, available: int
) -> int | None:
    """The smallest number of GPUs over which a step fits in shards; None if there is none up to
    `MANY`.
    """
    cast_frozen_weights(
        estimator.loss.model, torch.float32
    )  # as shards do; one process has been rehearsed already
    sharded = MemoryEstimator(
        estimator.loss, estimator.machine, estimator.base, 2, bool(estimator.packed)
    )

    def fits(count: int) -> bool:
        sharded.shards = count
        try:
            choose_packing(
                config.runtime,
                estimator if count == 1 and not estimator.shards else sharded,
                load,
                available,
            )
        except UserError:
            return False
        return True

    return next((count for count in (*range(1, 65), *range(72, MANY + 1, 8)) if fits(count)), None)


def _lines(facts: dict[str, Any], config: Config) -> Iterator[str]:
    """The plan in words."""
    method = (
        "all weights" if config.adapter.method == "none" else f"a {config.adapter.method} adapter"
    )
    trained, weights = facts["trainable"], facts["weights"]
    yield (
        f"model    {weights:,} parameters, {trained:,} train ({method}), {facts['precision']} "
        f"on {facts['device']}"
    )
    if facts.get("adapter"):
        yield f"adapter  {facts['adapter']}"
    kept = "float32" if config.optim.weights == "fp32" else "bfloat16, rounded at random"
    kept += ", those of the base in 4 bits" if config.adapter.quantize == "nf4" else ""
    yield (
        f"kept     weights in {kept}; AdamW's two moments in float32; peak learning rate "
        f"{facts['learning_rate']:g}"
    )
    if "steps" in facts:
        yield (
            f"data     {facts['steps']:,} steps, {facts['tokens']:,} tokens, "
            f"{facts['targets']:,} targets"
        )
    if facts.get("memory"):
        fill = f", {100 * facts['fill']:.0f} % full" if "fill" in facts else ""
        yield (
            f"packs    {facts['tokens_per_pack']:,} tokens{fill}; {facts['recomputed_layers']} of "
            f"{facts['layers']} "
            "layers recomputed"
        )
        yield (
            f"memory   {'each GPU' if facts.get('gpus_needed') else 'the process'} at the peak "
            "of a step, in GiB"
        )
        yield from (
            f"         {name:12}{size / 2**30:9.2f}" for name, size in facts["memory"].items()
        )
        yield f"         {'at hand':12}{facts['memory_at_hand'] / 2**30:9.2f}"
        if facts["answers"]:
            yield from _answers_in_words(facts["answers"], facts["memory"], facts["memory_at_hand"])
    if facts.get("seconds"):
        yield (
            f"time     about {facts['seconds']:,.0f} s for all steps, while nothing else runs "
            "on this machine"
        )
    if "gpus_needed" in facts:
        yield (
            f"GPUs     {facts['gpus_needed'] or f'more than {MANY}'} of this size are needed at "
            "least"
        )
    yield from (f"note     {note}" for note in facts.get("notes", []))
    if "refused" in facts:
        yield f"refused  {facts['refused']}"
