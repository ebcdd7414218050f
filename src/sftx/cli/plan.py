"""What a run will take, before it runs: settings, steps, tokens, memory by part, time: `sftx plan
run.yaml`.

It is the dry run: the settings that are set and the defaults that matter come first. No weights are
loaded. `sftx plan model=config.json gpus=64 gpu_memory=141GiB` needs neither data
nor a GPU: it tells what each of so many GPUs holds under `fully_shard`, whether that fits, and how
many GPUs are needed at least.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from sftx.cli._inputs import encoded, tokenizer_and_length, whole_number
from sftx.cli._output import write_json
from sftx.cli._plan_lines import MANY, plan_lines
from sftx.cli._prefix_tree import largest_tree
from sftx.cli._resolved import lines as resolved_lines
from sftx.cli._resolved import resolved
from sftx.data.encoder import DEFAULT_LENGTH, Encoder
from sftx.data.plan import Plan, plan_of
from sftx.data.shared_packs import Saving, packs_of_step, saving_of
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.eval.generation_memory import bytes_of_row, rows_at_once
from sftx.model.adapter import cast_frozen_weights, trainable
from sftx.model.checks.isolation import measure_isolation
from sftx.model.compile import planned
from sftx.model.folder import load_config
from sftx.model.load import stored_dtype
from sftx.model.memory import MemoryEstimator
from sftx.model.mixture import describe_adapter
from sftx.model.pack_loss import PackLoss, Paths
from sftx.model.regularization import of_each_example
from sftx.model.runtime import CUBLAS_WORKSPACE, Machine, machine, name_of
from sftx.model.threads import choose_threads
from sftx.model_config import positions_in
from sftx.printable import printable
from sftx.report.progress import working
from sftx.settings.schema import Config
from sftx.training.context import ProfileOf, check_context_size, choose_context, context_sizes
from sftx.training.memory_plan import (
    Packing,
    StepProfile,
    choose_packing,
    meta_model,
    seconds_of,
    set_example_cost,
)
from sftx.training.optim import peak_learning_rate
from sftx.training.run_data import longest_example
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
LENGTH_TRIED = 64
"""Tokens of the examples with which it is tried whether a model of this kind can be packed; the run
itself tries examples as long as its own.
"""
CALIBRATION = 1024  # tokens of a layer that is timed; two seconds for a model of 0.6B on two cores
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
"""What the settings call them."""


def run(config: Config, gpus: str = "", gpu_memory: str = "", json: str = "") -> int:
    """Print the plan. Returns 0, or 1 where the run does not fit."""
    if bool(gpus) != bool(gpu_memory):
        raise UserError("sftx plan: gpus= and gpu_memory= belong together")
    count = whole_number("plan: gpus", gpus) if gpus else 1
    model_config = load_config(config.model)
    loss = meta_model(config, model_config, _added_token_ids(config))
    check_context_size(config, model_config, count)
    data, profile_of = _load(config, loss)
    _choose_path(loss, min(profile_of(count).longest, LENGTH_TRIED))
    runtime = config.runtime
    shown = working("planning memory and time", runtime.progress)
    notes: list[str] = []
    with machine(runtime) as here, shown:
        if gpus:
            available = _bytes(gpu_memory)
            reserved = CUBLAS_WORKSPACE
            here = _with_gpus(here, config)
        else:
            _, notes = choose_threads(runtime, here.device, None)
            available, reserved = here.available_memory()
        estimator = _estimator(config, loss, here, reserved, count)
        sizes = context_sizes(config, model_config, count)
        load = choose_context(runtime, sizes, count, estimator, profile_of, available)
        _, weights = trainable(loss)
        estimator.compiled = planned(runtime.compile, here.device, weights, load.tokens)
        facts = _facts(config, data, loss, available)
        facts["context_parallel"] = estimator.context_size
        facts["adapter"] = describe_adapter(loss.model)
        facts["save_dtype"] = name_of(stored_dtype(config.model, model_config))
        facts["device"] = f"{gpus} GPUs" if gpus else str(here.device)
        facts["precision"] = name_of(here.precision)
        facts["answers"] = _answers(config, loss, here.precision)
        facts |= _packing(config, estimator, None if gpus else data, load, available)
        facts["notes"] = [*notes, *facts.get("notes", [])]
        if gpus:
            facts["gpus_needed"] = _fewest_gpus(config, estimator, profile_of, available)
            facts["longest_that_fits"] = _longest_that_fits(config, estimator, load, available)
    facts["settings"] = resolved(config, DEFAULTS, _defaults_here(config, loss, facts))
    lines = resolved_lines(facts["settings"])
    lines += plan_lines(facts, config)
    print(printable("\n".join(lines)))
    if json:
        write_json(json, facts)
    return 1 if "refused" in facts else 0


def _choose_path(loss: PackLoss, longest: int) -> None:
    """Let the model compute as a run would: packed, in padded batches or one example at a time."""
    found = measure_isolation(loss.model, longest, longest)
    loss.take(Paths(found.packs, not found.packs and found.pads))


def _added_token_ids(config: Config) -> dict[int, bool]:
    """The tokens that the run adds; the tokenizer is read where there are any."""
    if config.model.add_tokens or config.model.add_special_tokens:
        return Tokenizer.of_model(config.model).added_token_ids
    return {}


def _estimator(
    config: Config, loss: PackLoss, here: Machine, reserved: int, count: int
) -> MemoryEstimator:
    """What predicts the memory of a step on one device, or in shards over `count` of them."""
    nf4 = config.adapter.quantize == "nf4"
    cast_frozen_weights(loss.model, here.precision)
    shards = count if count > 1 else None
    return MemoryEstimator(loss, here, reserved, shards, nf4)


def _with_gpus(here: Machine, config: Config) -> Machine:
    """This machine as if it had GPUs."""
    is_fp32 = config.runtime.precision == "fp32"
    precision = torch.float32 if is_fp32 else torch.bfloat16
    return replace(here, device=torch.device("cuda"), precision=precision)


def _packing(
    config: Config,
    estimator: MemoryEstimator,
    data: _Data | None,
    load: StepProfile,
    available: int,
) -> dict[str, Any]:
    """How a step is cut into packs, or why none fits; how full they are, and the time, where the
    `data` of this machine's run is given.
    """
    try:
        chosen = choose_packing(config.runtime, estimator, load, available)
    except UserError as error:
        return {"refused": str(error)}
    facts: dict[str, Any] = {
        "tokens_per_pack": chosen.tokens_per_pack,
        "recomputed_layers": chosen.recomputed,
        "layers": len(estimator.layers),
        "memory": chosen.parts(),
        "notes": list(chosen.notes),
    }
    if data is None:
        return facts
    padding = None
    if estimator.loss.paths.padded:
        padding = data.plan.padding(chosen.tokens_per_pack)
        facts["padding"] = padding
    else:
        facts |= _packs(config, data, estimator.loss.paths, chosen)
    facts |= _seconds(estimator, data, chosen, padding)
    return facts


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
    number, letter, is_binary = found.groups()
    base = 1024 if is_binary else 1000
    power = "KMGT".index(letter) + 1
    return int(float(number) * base**power)


@dataclass(frozen=True)
class _Data:
    """The data of a run, what each step shows of it, and what is asked of a step without and with
    shared prefixes.
    """

    corpus: Corpus
    plan: Plan
    alone: StepProfile
    saving: Saving


def _load(config: Config, loss: PackLoss) -> tuple[_Data | None, ProfileOf]:
    """The run's own data and its load on so many processes; without data: full packs of the
    longest examples, all targets.
    """
    if config.data.train or config.data.rows:
        tokenizer, max_length = tokenizer_and_length(config)
        corpus = encoded(config, Encoder(tokenizer, config.data, max_length))
        kinds = corpus.ledger.by_kind()
        if kinds:
            print(printable(f"data     {kinds}"))
        plan = plan_of(corpus, config)
        set_example_cost(plan, loss, corpus.targets)
        alone = partial(StepProfile.of_plan, plan, int(corpus.targets.sum()))
        saving = saving_of(plan, corpus) if _may_share(config) else Saving()
        data = _Data(corpus, plan, alone(1), saving)
        return data, lambda processes: alone(processes).sharing(saving)
    longest = longest_example(config, loss.model.config)
    size = config.runtime.tokens_per_pack or DEFAULT_LENGTH
    full = StepProfile(min(longest, size), 1 << 20, 1.0)
    return None, lambda processes: full


def _may_share(config: Config) -> bool:
    """Whether the settings allow shared prefixes; the start of a run checks whether the model does."""
    return config.runtime.share_prefixes != "off" and not of_each_example(config.loss)


def _facts(config: Config, data: _Data | None, loss: PackLoss, available: int) -> dict[str, Any]:
    trained, weights = trainable(loss)
    facts: dict[str, Any] = {
        "trainable": trained,
        "weights": weights,
        "memory_at_hand": available,
        "learning_rate": peak_learning_rate(config.optim, config.adapter),
    }
    if data is not None:
        tokens = data.alone.tokens
        targets = round(tokens * data.alone.target_share)
        facts |= {"steps": data.plan.num_steps, "tokens": round(tokens), "targets": targets}
    return facts


def _packs(config: Config, data: _Data, paths: Paths, chosen: Packing) -> dict[str, Any]:
    """How full the packs of the first (at most 50) steps are, and the largest tree of the first."""
    size = chosen.tokens_per_pack
    plan = data.plan
    share = _may_share(config) and paths.isolate
    tokens = 0
    count = 0
    tree: list[str] = []
    for step in range(min(plan.num_steps, 50)):
        ranks, _ = packs_of_step(plan, data.corpus, step, size, share)
        packs = ranks[0]
        count += len(packs)
        for members in packs:
            whole = plan.lengths[list(members.examples)].sum()
            tokens += int(whole) - sum(members.shared)
        if step == 0:
            tree = largest_tree(packs, plan.lengths)
    return {"fill": tokens / (size * max(count, 1)), "tree": tree}


def _seconds(
    estimator: MemoryEstimator, data: _Data, chosen: Packing, padding: float | None
) -> dict[str, Any]:
    """The seconds of all steps, and what shared prefixes save in packs of the chosen size.

    `padding`: the share of padded batches that is padding; None where there are none.
    """
    paths = estimator.loss.paths
    alone = seconds_of(estimator, data.alone, chosen, CALIBRATION, padding or 0.0)
    if padding is not None or not (data.saving.saved_tokens and paths.isolate):
        return {"seconds": alone}
    saving = saving_of(data.plan, data.corpus, chosen.tokens_per_pack)
    # By their work, from one measurement: two would differ by chance.
    saved_work = saving.saved_work / max(saving.work, 1.0)
    seconds = None if alone is None else alone * (1 - saved_work)
    shared = {"tokens": saving.share, "flops": saved_work, "seconds_without": alone}
    return {"seconds": seconds, "shared_prefixes": shared}


def _longest_that_fits(
    config: Config, estimator: MemoryEstimator, load: StepProfile, available: int
) -> int | None:
    """The longest example that is sure to fit, of 1,024, 1,536, 2,048, 3,072 ... tokens, where a
    step has more than one of them; None where none does.
    """
    settings = estimator.loss.model.config.get_text_config().to_dict()
    positions = positions_in(settings) or 1 << 20
    least: dict[str, object] = {"tokens_per_pack": 1}
    if config.runtime.recompute == "auto":
        least["recompute"] = "all"
    runtime = config.runtime.model_copy(update=least)

    def too_long(tokens: int) -> bool:
        one = replace(load, longest=tokens, step_tokens=2 * tokens)
        try:
            choose_packing(runtime, estimator, one, available)
        except UserError:
            return True
        return False

    steps = [half << power for power in range(9, 32) for half in (2, 3)]
    lengths = [tokens for tokens in steps if tokens <= positions]
    found = bisect_left(lengths, x=True, key=too_long)
    return lengths[found - 1] if found else None


def _answers(config: Config, loss: PackLoss, precision: torch.dtype) -> int:
    """Bytes that answering the prompts of an evaluation takes at most; 0 where none are answered."""
    asked = config.eval.prompts
    prompts = asked if isinstance(asked, int) else MANY
    if not prompts:
        return 0
    about = loss.model.config
    longest = longest_example(config, about)
    return most_memory(about, prompts, longest, config.eval.new_tokens, precision.itemsize)


def most_memory(
    config: PreTrainedConfig,
    prompts: int,
    longest: int,
    new_tokens: int,
    itemsize: int,
    free: int | None = None,
) -> int:
    """Bytes that the largest group of `prompts` takes that are answered together, `longest` tokens
    the longest of them: an upper bound. `free`: as in `rows_at_once`.
    """
    rows = min(prompts, rows_at_once(config, longest, new_tokens, itemsize, free))
    return rows * bytes_of_row(config, longest, new_tokens, itemsize)


def _fewest_gpus(
    config: Config, estimator: MemoryEstimator, profile_of: ProfileOf, available: int
) -> int | None:
    """The smallest number of GPUs over which a step fits in shards; None if there is none up to
    `MANY`.
    """
    # One that knows shards already has measured most of what is asked here.
    if estimator.shards:
        sharded = copy.copy(estimator)
    else:
        nf4 = bool(estimator.packed)
        sharded = MemoryEstimator(estimator.loss, estimator.machine, estimator.base, 2, nf4)

    def fits(count: int) -> bool:
        sharded.shards = count
        used = sharded
        if count == 1 and not estimator.shards:
            used = estimator
        sizes = context_sizes(config, estimator.loss.model.config, count)
        if count % sizes[0]:
            return False
        load = choose_context(config.runtime, sizes, count, used, profile_of, available)
        try:
            choose_packing(config.runtime, used, load, available)
        except UserError:
            return False
        return True

    for count in (*range(1, 65), *range(72, MANY + 1, 8)):
        if fits(count):
            return count
    return None
