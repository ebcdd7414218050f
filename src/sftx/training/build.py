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
from sftx.data.dataset import load_corpora
from sftx.data.encoder import DEFAULT_LENGTH, Encoder
from sftx.data.pack import probe_pack
from sftx.data.plan import Plan, plan_of
from sftx.data.shared_packs import Saving, packs_of_step
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.eval.questions import Questions, read_questions
from sftx.model.adapter import cast_frozen_weights, trainable
from sftx.model.checkpointing import recompute
from sftx.model.checks.start import check_paths, check_sizes, check_trainable
from sftx.model.compile import compile_layers, planned
from sftx.model.folder import load_config
from sftx.model.load import load_model, stored_dtype
from sftx.model.memory import MemoryEstimator
from sftx.model.pack_loss import PackLoss, Paths
from sftx.model.runtime import Machine, name_of
from sftx.model.save import load_tokenizer
from sftx.model.shard import Unread, build_mesh, choose_layout, shard, unread_model
from sftx.model.threads import choose_threads
from sftx.model.trainable import choose_weights
from sftx.report.facts import RunFacts
from sftx.report.progress import Progress
from sftx.report.record import Run
from sftx.settings.schema import Config
from sftx.training import checkpoint, prefix_sharing
from sftx.training.best import chosen_by
from sftx.training.checks import check_best, check_ranks, check_same_tokens, check_stop_token
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
from sftx.training.run_identity import (
    dotted,
    find_beginning,
    mathematics,
    refuse_wrong_folder,
)
from sftx.training.signals import StopFlag
from sftx.types import UserError

CALIBRATION = 256
"""Tokens of a layer that is timed before a run, to predict its time."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on and evaluates."""

    tokenizer: Tokenizer
    max_length: int
    encoder: Encoder
    corpus: Corpus
    held_out: Corpus | None
    plan: Plan
    questions: Questions | None
    saving: Saving  # by sharing prefixes

    @property
    def notes(self) -> list[str]:
        """What there is to say of the questions."""
        return [] if self.questions is None else self.questions.notes


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
    data = _read_data(config, model_config, progress)
    plan = data.plan
    # Not earlier: encoding may take longer than processes wait for each other.
    until_end.enter_context(distributed.joined(machine.device, config.runtime.rank_timeout))
    run.facts = distributed.broadcast(run.facts)
    threads, thread_notes = choose_threads(config.runtime, machine.device, run.facts.threads)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    check_same_tokens(data.tokenizer, tokenizer, data.corpus)
    available, reserved = machine.available_memory()
    _begin_phase(progress, "loading the model")
    model = build_model(config, model_config, machine, data.tokenizer.added_token_ids)
    set_example_cost(plan, model.loss, data.corpus.targets)
    profile = StepProfile.of_plan(plan, int(data.corpus.targets.sum()), distributed.world_size())
    path_notes = _check_model(config, machine, model.loss, data, profile, progress)
    _begin_phase(progress, "planning memory and time, and compiling where that pays")
    estimator = _estimator(config, model_config, machine, model, data, reserved)
    packing, seconds = _choose_packing(config, run, model.loss, data, profile, estimator, available)
    peak = peak_learning_rate(config.optim, config.adapter)
    scheduled = partial(learning_rate, num_steps=plan.num_steps, optim=config.optim, peak=peak)
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
        learning_rate=rate or scheduled,
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
    return checkpoint.State(0, data.plan.fingerprint, decides)


def longest_example(config: Config, model_config: PreTrainedConfig) -> int:
    """`data.max_length`, or the model's positions up to 8,192 tokens."""
    text = model_config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or DEFAULT_LENGTH
    return config.data.max_length or min(positions, DEFAULT_LENGTH)


def _read_data(config: Config, model_config: PreTrainedConfig, progress: Progress) -> RunData:
    progress.phase("reading the data")
    max_length = longest_example(config, model_config)
    tokenizer = Tokenizer.of_model(config.model)
    encoder = Encoder(tokenizer, config.data, max_length)
    corpus, held_out = load_corpora(config, tokenizer, max_length, progress.encoding, encoder)
    plan = plan_of(corpus, config)
    progress.data(corpus.ledger, None if held_out is None else held_out.ledger, plan.num_steps)
    check_stop_token(corpus, encoder, config.data)
    text = model_config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    questions = read_questions(config, encoder, held_out, positions)
    check_best(chosen_by(config.eval), held_out, questions)
    saving = prefix_sharing.possible_saving(config.runtime, plan, corpus)
    return RunData(tokenizer, max_length, encoder, corpus, held_out, plan, questions, saving)


def build_model(
    config: Config,
    model_config: PreTrainedConfig,
    machine: Machine,
    added_token_ids: dict[int, bool],
) -> BuiltModel:
    """Load the model, choose what trains, and put it in shards where there are several ranks."""
    nf4 = machine.precision if config.adapter.quantize == "nf4" else None
    dtype, notes = _kept_weights(config, machine)
    layout, unread = "", None
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
    if not layout:
        cast_frozen_weights(model, machine.precision)
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
    profile: StepProfile,
    progress: Progress,
) -> list[str]:
    """Check the model against the data, and choose its paths; what had to be changed, in words."""
    progress.phase("checking the model")
    corpora = [data.corpus] if data.held_out is None else [data.corpus, data.held_out]
    check_sizes(loss, data.max_length, max(corpus.largest_id for corpus in corpora))
    check_trainable(loss)
    longest = max(int(corpus.lengths.max(initial=1)) for corpus in corpora)
    largest = largest_pack(config.runtime, machine.device, profile.sharing(data.saving))
    probe = probe_pack([data.corpus.example(i) for i in range(min(len(data.corpus), 3))])
    share = prefix_sharing.wants_to_share(config.runtime, data.saving)
    notes = check_paths(loss, probe, machine.precision, longest, largest, share)
    prefix_sharing.refuse_unshared(config.runtime, loss, notes)
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
    twin.take(Paths(model.loss.paths.isolate, model.loss.paths.transform))
    nf4 = config.adapter.quantize == "nf4"
    return MemoryEstimator(twin, machine, reserved, model.shards, nf4)


def _choose_packing(
    config: Config,
    run: Run,
    loss: PackLoss,
    data: RunData,
    profile: StepProfile,
    estimator: MemoryEstimator,
    available: int,
) -> tuple[Packing, float | None]:
    """Choose packs and checkpointed layers, and compile where that is asked for or repays itself;
    the predicted seconds of all steps too.
    """
    machine, wish = estimator.machine, config.runtime.compile
    parameters = trainable(loss)[1]
    estimator.compiled = not run.finished and planned(
        wish, machine.device, parameters, profile.tokens
    )
    same_device = run.facts.device.partition(":")[0] == machine.device.type
    earlier = run.facts.tokens_per_pack if same_device else None
    shares = prefix_sharing.shares_prefixes(config.runtime, run.facts, loss)
    profile = profile.sharing(data.saving) if shares else profile
    chosen = choose_packing(config.runtime, estimator, profile, available, earlier)
    # Of layers as they are, before they are compiled.
    seconds = seconds_of(estimator, profile, chosen, CALIBRATION)
    recompute(loss.model, chosen.recomputed)
    if estimator.compiled:
        ranks, read = packs_of_step(data.plan, data.corpus, 0, chosen.tokens_per_pack, shares)
        note = compile_layers(loss, ranks[0][0].build(read), machine, wish)
        if not loss.paths.compiled:  # layers as they are keep more
            estimator.compiled = False
            chosen = choose_packing(config.runtime, estimator, profile, available, earlier)
            recompute(loss.model, chosen.recomputed)
        chosen = replace(chosen, notes=(*chosen.notes, note))
    if distributed.is_joined() and not loss.paths.isolate:
        # Ranks must run the model equally often, which they do where each pack is one example.
        chosen = replace(chosen, tokens_per_pack=1)
    notes = (*chosen.notes, *data.saving.notes()) if shares else chosen.notes
    return replace(chosen, shares_prefixes=shares, notes=notes), seconds


def _begin(job: Job, packing: Packing, threads: int, peak: float, notes: list[str]) -> None:
    """Load the checkpoint to continue from, if there is one, and begin the record of the run;
    `notes` gets what there is to say of it.
    """
    run, decides = job.run, job.state.mathematics
    job.tell("looking for a checkpoint", 0, 0)
    distributed.heartbeat("looking for a checkpoint")
    packs = {"tokens per pack": job.tokens_per_pack, "shared prefixes": packing.shares_prefixes}
    check_ranks({**dotted(decides), **packs})
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
        shares_prefixes=packing.shares_prefixes,
        notes=notes,
        peak_learning_rate=peak,
        stop_id=job.encoder.stop_id,
        threads=threads,
        recomputed_layers=packing.recomputed,
        predicted={"memory": packing.parts(), "seconds": job.predicted_seconds},
        eval_before=found.eval_before,
        changed=found.changes,
        gguf=import_module("sftx.gguf.read").source_of(job.config.model.path),
    )
    run.start(job.state.step, found.carried, facts)
    job.evaluations = distributed.broadcast(run.evaluations())
    notes += job.write_ledger(again)
    if lacking := job.no_room():
        raise UserError(f"output: {run.folder}: there is no room for the trained model: {lacking}")


def _summary(job: Job, peak: float) -> str:
    trained, all_of_them = trainable(job.loss)
    machine = job.machine
    return (
        f"{type(job.loss.model).__name__}: {trained:,} of {all_of_them:,} parameters train, "
        f"{name_of(machine.precision)} on {machine.device}, {job.tokens_per_pack:,} tokens per "
        f"pack, peak learning rate {peak:g}"
    )
