"""Everything between the settings and the first step: data, model, checks, packing, optimizer."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module

import torch
from peft import PeftModel
from transformers import PreTrainedConfig

from sftx import distributed
from sftx.data.plan import Plan
from sftx.data.shared_packs import packs_of_step
from sftx.model.adapter import cast_frozen_weights, trainable
from sftx.model.checkpointing import recompute
from sftx.model.checks.context import check_context
from sftx.model.checks.start import check_paths, check_sizes, check_trainable
from sftx.model.compile import compile_layers, planned
from sftx.model.folder import load_config
from sftx.model.load import load_model, stored_dtype
from sftx.model.memory import MemoryEstimator
from sftx.model.pack_loss import PackLoss
from sftx.model.runtime import Machine, name_of
from sftx.model.same_files import digest_of
from sftx.model.shard import Unread, build_mesh, choose_layout, shard, unread_model
from sftx.model.threads import choose_threads
from sftx.model.trainable import choose_weights
from sftx.report.facts import RunFacts
from sftx.report.progress import Progress
from sftx.report.record import Run
from sftx.settings.flat import flat
from sftx.settings.schema import Config
from sftx.training import checkpoint
from sftx.training.checks import check_ranks, load_same_tokenizer
from sftx.training.context import ProfileOf, check_context_size, choose_size, join_context
from sftx.training.job import Job
from sftx.training.memory_plan import (
    Packing,
    StepProfile,
    choose_packing,
    largest_pack,
    meta_model,
    seconds_of,
    set_example_cost,
)
from sftx.training.optim import build_optimizer, learning_rate, peak_learning_rate
from sftx.training.prefix_sharing import refuse_unshared, shares_prefixes, wants_to_share
from sftx.training.run_data import RunData, read_data
from sftx.training.run_identity import (
    find_beginning,
    mathematics,
    refuse_wrong_folder,
)
from sftx.training.signals import StopFlag
from sftx.types import UserError

CALIBRATION = 256
"""Tokens of a layer that is timed before a run, to predict its time."""


@dataclass(frozen=True)
class BuiltModel:
    """The model on its device, with its adapter, in shards where there are several ranks."""

    loss: PackLoss
    adapted: PeftModel | None
    notes: list[str]
    shards: int | None  # over how many ranks; None without any


def prepare(
    config: Config,
    machine: Machine,
    run: Run,
    progress: Progress,
    until_end: ExitStack,
    stop: StopFlag,
    rate: Callable[[int], float] | None = None,
) -> Job:
    """Read and check everything a run needs. Bad data is found before the model is loaded.

    `rate` gives the learning rate of update `step` (0-based) in place of the settings' schedule.
    """
    refuse_wrong_folder(config, run)
    model_config = load_config(config.model)
    check_context_size(config, model_config, distributed.world_size())
    data = read_data(config, model_config, progress)
    plan = data.plan
    # Not earlier: encoding may take longer than processes wait for each other.
    until_end.enter_context(distributed.joined(machine.device, config.runtime.rank_timeout))
    run.facts = distributed.broadcast(run.facts)
    threads, thread_notes = choose_threads(config.runtime, machine.device, run.facts.threads)
    torch.manual_seed(config.seed)
    tokenizer = load_same_tokenizer(config.model, data.tokenizer, data.corpus)
    available, reserved = machine.available_memory()
    _begin_phase(progress, "loading the model")
    model = build_model(config, model_config, machine, data.tokenizer.added_token_ids)
    set_example_cost(plan, model.loss, data.corpus.targets)
    load_of = partial(StepProfile.of_plan, plan, int(data.corpus.targets.sum()))
    path_notes = _check_model(config, machine, model.loss, data, load_of, progress)
    _begin_phase(progress, "planning memory and time, and compiling where that pays")
    estimator = _estimator(config, model_config, machine, model, data, reserved)
    packing, seconds = _choose_packing(config, run, model.loss, data, load_of, estimator, available)
    peak = peak_learning_rate(config.optim, config.adapter)
    rate = rate or partial(learning_rate, num_steps=plan.num_steps, optim=config.optim, peak=peak)
    job = Job(
        config=config,
        machine=machine,
        run=run,
        stop=stop,
        encoder=data.encoder,
        corpus=data.corpus,
        held_out=data.held_out,
        plan=plan,
        packing=packing,
        loss=model.loss,
        adapted=model.adapted,
        tokenizer=tokenizer,
        save_dtype=stored_dtype(config.model, model_config),
        optimizer=build_optimizer(model.loss, config.optim),
        learning_rate=rate,
        state=_beginning(config, data, machine),
        predicted_seconds=seconds,
        tell=progress.phase,
    )
    job.ask(data.questions)
    notes = [*data.notes, *model.notes, *thread_notes, *path_notes, *packing.notes]
    _begin(job, packing, threads, peak, notes)
    progress.model(_summary(job, peak), notes, job.state.step, available)
    return job


def _begin_phase(progress: Progress, name: str) -> None:
    """Tell the user, and the other processes, what this one does."""
    progress.phase(name)
    distributed.heartbeat(name)


def _beginning(config: Config, data: RunData, machine: Machine) -> checkpoint.State:
    """The state before the first step."""
    decides = mathematics(config, data.corpus.fingerprint, data.max_length, machine.precision)
    decides["data"]["held_out"] = data.held_out and data.held_out.fingerprint
    decides["model"]["files"] = digest_of(config.model.path)
    return checkpoint.State(0, data.plan.fingerprint, decides)


def build_model(
    config: Config,
    model_config: PreTrainedConfig,
    machine: Machine,
    added_token_ids: dict[int, bool],
) -> BuiltModel:
    """Load the model, choose what trains, and put it in shards where there are several ranks."""
    nf4 = machine.precision if config.adapter.quantize == "nf4" else None
    dtype, notes = _kept_weights(config, machine)
    layout = ""
    unread = None
    if distributed.is_joined():
        layout, unread, said = _plan_shards(config, model_config, machine, dtype, added_token_ids)
        notes += said
    if unread is not None:
        model = unread.model
    else:
        device = torch.device("cpu") if layout and nf4 is None else machine.device
        model = load_model(config.model, device, dtype, nf4, model_config)
    adapted, said = choose_weights(
        model, config.model, config.adapter, config.seed, added_token_ids
    )
    notes += said
    loss = PackLoss(model, config.loss)
    cast_frozen_weights(model, machine.precision, unread is not None)
    if not layout:
        return BuiltModel(loss, adapted, notes, None)
    mesh = build_mesh(layout, machine.device, config.runtime.rank_timeout)
    shard(loss, mesh, machine.precision)
    if unread is not None:
        unread.read()
    return BuiltModel(loss, adapted, notes, mesh.size(1))


def _kept_weights(config: Config, machine: Machine) -> tuple[torch.dtype, list[str]]:
    """The dtype of the parameters, and what to say of it."""
    if config.optim.weights == "fp32":
        return torch.float32, []
    if machine.precision == torch.float32:
        raise UserError(
            f"optim.weights: {config.optim.weights} computes in bf16; set runtime.precision: bf16 "
            "too"
        )
    note = "weights are bf16 without an fp32 copy: updates are rounded at random (optim.weights)"
    return torch.bfloat16, [note]


def _plan_shards(
    config: Config,
    model_config: PreTrainedConfig,
    machine: Machine,
    dtype: torch.dtype,
    added_token_ids: dict[int, bool],
) -> tuple[str, Unread | None, list[str]]:
    """How several ranks hold the model; the model without its weights, where each rank can read its
    own share of them; and what to say of it.
    """
    unread = unread_model(config.model, dtype, model_config)
    weights = trainable(unread.model)[1]
    trained = weights if config.adapter.method == "none" else 0
    layout = choose_layout(config.runtime, machine.device, weights, trained)
    # New rows and DoRA's magnitudes are made from the weights, and NF4 by transformers.
    made_from_weights = config.adapter.method == "dora" or config.adapter.quantize == "nf4"
    if layout == "replicate" or added_token_ids or made_from_weights:
        return layout, None, []
    if not unread.complete:
        note = (
            "the files name the weights otherwise than the model: every process reads all of them"
        )
        return layout, None, [note]
    return layout, unread, []


def _check_model(
    config: Config,
    machine: Machine,
    loss: PackLoss,
    data: RunData,
    profile_of: ProfileOf,
    progress: Progress,
) -> list[str]:
    """Check the model against the data, and choose its paths; what had to be changed, in words."""
    progress.phase("checking the model")
    corpora = [data.corpus] if data.held_out is None else [data.corpus, data.held_out]
    check_sizes(loss, data.max_length, max(corpus.largest_id for corpus in corpora))
    check_trainable(loss)
    longest = max(int(corpus.lengths.max(initial=1)) for corpus in corpora)
    profile = profile_of(distributed.world_size()).sharing(data.saving)
    largest = largest_pack(config.runtime, machine.device, profile)
    share = wants_to_share(config.runtime, data.saving)
    notes = check_paths(loss, data.probe(), machine.precision, longest, largest, share)
    refuse_unshared(config.runtime, loss, notes)
    if loss.routers.choose_otherwise():
        name = type(loss.model).__name__
        how = "here they choose as when the model is served"
        notes.append(f"routers of {name} choose at random in training mode: {how}")
    return notes


def _estimator(
    config: Config,
    model_config: PreTrainedConfig,
    machine: Machine,
    model: BuiltModel,
    data: RunData,
    reserved: int,
) -> MemoryEstimator:
    if model.shards is None:
        return MemoryEstimator(model.loss.train(), machine, reserved)
    # What is in shards cannot run on tensors without contents: a copy without weights does.
    model.loss.train()
    twin = meta_model(config, model_config, data.tokenizer.added_token_ids)
    cast_frozen_weights(twin.model, machine.precision)
    twin.take(replace(model.loss.paths, forgets=None))
    nf4 = config.adapter.quantize == "nf4"
    return MemoryEstimator(twin, machine, reserved, model.shards, nf4)


def _choose_packing(
    config: Config,
    run: Run,
    loss: PackLoss,
    data: RunData,
    profile_of: ProfileOf,
    estimator: MemoryEstimator,
    available: int,
) -> tuple[Packing, float | None]:
    """Choose the ranks that share packs, the packs and the checkpointed layers, and compile where
    that is asked for or repays itself; the predicted seconds of all steps too.
    """
    machine = estimator.machine
    wish = config.runtime.compile
    ranks_before = run.facts.context_parallel
    size, profile = choose_size(config, loss, estimator, profile_of, available, ranks_before)
    context = join_context(size, config.runtime.rank_timeout)
    if context is not None:
        check_context(loss, data.probe(), context, machine.precision)
    parameters = trainable(loss)[1]
    estimator.compiled = not run.finished and planned(
        wish, machine.device, parameters, profile.tokens
    )
    same_device = run.facts.device.partition(":")[0] == machine.device.type
    earlier = run.facts.tokens_per_pack if same_device else None
    shares = shares_prefixes(config.runtime, run.facts, loss, context)
    profile = profile.sharing(data.saving) if shares else profile
    chosen = choose_packing(config.runtime, estimator, profile, available, earlier)
    # Of layers as they are, before they are compiled.
    padding = _padding(data.plan, loss, chosen.tokens_per_pack)
    seconds = seconds_of(estimator, profile, chosen, CALIBRATION, padding)
    recompute(loss.model, chosen.recomputed)
    if estimator.compiled:
        ranks, read = packs_of_step(data.plan, data.corpus, 0, chosen.tokens_per_pack, shares)
        note = compile_layers(loss, ranks[0][0].build(read), machine, wish, context)
        if not loss.paths.compiled:  # layers as they are keep more
            estimator.compiled = False
            chosen = choose_packing(config.runtime, estimator, profile, available, earlier)
            padding = _padding(data.plan, loss, chosen.tokens_per_pack)
            recompute(loss.model, chosen.recomputed)
        chosen = replace(chosen, notes=(*chosen.notes, note))
    if distributed.is_joined() and not (loss.paths.isolate or loss.paths.padded):
        # Ranks must run the model equally often, which they do where each pack is one example.
        chosen = replace(chosen, tokens_per_pack=1)
    notes = [*chosen.notes, *_pack_notes(data, loss, padding, shares)]
    chosen = replace(chosen, shares_prefixes=shares, context=context, notes=tuple(notes))
    loss.keeps_gathered = chosen.gathered
    return chosen, seconds


def _pack_notes(data: RunData, loss: PackLoss, padding: float, shares: bool) -> list[str]:
    """What there is to say of the packs."""
    if loss.paths.padded:
        return [f"padded in batches of like lengths, {100 * padding:.1f} % padding"]
    if shares:
        return data.saving.notes()
    return []


def _padding(plan: Plan, loss: PackLoss, tokens_per_pack: int) -> float:
    """The share of what the model computes that is padding."""
    if loss.paths.padded:
        return plan.padding(tokens_per_pack, distributed.world_size())
    return 0.0


def _begin(job: Job, packing: Packing, threads: int, peak: float, notes: list[str]) -> None:
    """Load the checkpoint to continue from, if there is one, and begin the record of the run;
    `notes` gets what there is to say of it.
    """
    run = job.run
    decides = job.state.mathematics
    job.tell("looking for a checkpoint", 0, 0)
    distributed.heartbeat("looking for a checkpoint")
    check_ranks({**flat(decides), **packing.of_all_ranks()})
    found = find_beginning(job.config, run, job.plan, decides, job.loss, job.optimizer)
    job.state = found.state
    notes += found.notes
    if run.finished and not found.changed:
        notes += run.unreadable() + job.write_ledger(again=True)
        return
    again = run.exists and not found.changed
    facts = RunFacts(
        mathematics=decides,
        plan=job.plan.fingerprint,
        num_steps=job.plan.num_steps,
        device=str(job.machine.device),
        precision=name_of(job.machine.precision),
        parameters=dict(zip(("trainable", "all"), trainable(job.loss), strict=True)),
        tokens_per_pack=job.tokens_per_pack,
        context_parallel=1 if packing.context is None else packing.context.size,
        shares_prefixes=packing.shares_prefixes,
        padded=job.loss.paths.padded,
        notes=notes,
        peak_learning_rate=peak,
        stop_id=job.encoder.stop_id,
        threads=threads,
        recomputed_layers=packing.recomputed,
        predicted={"memory": packing.parts(), "seconds": job.predicted_seconds},
        eval_before=found.eval_before,
        changed=found.changes,
        gguf=import_module("sftx.gguf.read").source_of(job.config.model.path),
        card=import_module("sftx.report.provenance").card_fields(job.config),
    )
    run.start(job.state.step, found.carried, facts)
    job.evaluations = distributed.broadcast(run.evaluations())
    notes += job.write_ledger(again)
    lacking = job.no_room()
    if lacking:
        raise UserError(f"output: {run.folder}: there is no room for the trained model: {lacking}")


def _summary(job: Job, peak: float) -> str:
    trained, all_of_them = trainable(job.loss)
    machine = job.machine
    shared = (
        "" if job.packing.context is None else f" shared by {job.packing.context.size} processes"
    )
    return (
        f"{type(job.loss.model).__name__}: {trained:,} of {all_of_them:,} parameters train, "
        f"{name_of(machine.precision)} on {machine.device}, {job.tokens_per_pack:,} tokens per "
        f"pack{shared}, peak learning rate {peak:g}"
    )
