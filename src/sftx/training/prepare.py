"""Everything that happens before the first step: data, then model, then checks, then what is left
to do.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sftx import distributed
from sftx.data.dataset import DEFAULT_LENGTH, load_corpora, write_ledger
from sftx.data.encoder import Encoder
from sftx.data.pack import build_pack, probe_pack
from sftx.data.plan import Plan, plan_of
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.model.adapter import cast_frozen_weights, trainable
from sftx.model.checkpointing import recompute
from sftx.model.checks.start import check_paths, check_sizes, check_trainable
from sftx.model.compile import compile_layers, planned
from sftx.model.folder import load_config
from sftx.model.freeze import choose_weights
from sftx.model.load import load_model, stored_dtype
from sftx.model.memory import MemoryEstimator
from sftx.model.pack_loss import PackLoss, Paths
from sftx.model.runtime import Machine
from sftx.model.save import load_tokenizer
from sftx.model.shard import build_mesh, choose_layout, shard, unread_model
from sftx.model.threads import settle_threads
from sftx.report.lock import LOCK, OWNER
from sftx.report.progress import Progress
from sftx.report.record import Run
from sftx.settings.schema import Config, Data
from sftx.training import checkpoint
from sftx.training.async_writer import AsyncWriter
from sftx.training.memory_plan import (
    Packing,
    StepProfile,
    choose_packing,
    largest_pack,
    meta_model,
    seconds_of,
    set_example_cost,
)
from sftx.training.optim import build_optimizer, peak_learning_rate
from sftx.training.room import numbers, shortage
from sftx.training.run_identity import changes, dotted, mathematics, name_of
from sftx.types import UserError

OWN = {LOCK, OWNER, "base", "run.json"}
CALIBRATION = 256  # tokens of a layer timed before a run, to predict its time


@dataclass
class Job:
    """A run that is ready to take steps."""

    config: Config
    machine: Machine
    run: Run
    encoder: Encoder
    corpus: Corpus
    held_out: Corpus | None
    plan: Plan
    loss: PackLoss
    adapted: PeftModel | None
    tokenizer: Any  # the transformers tokenizer that is saved with the model
    optimizer: torch.optim.AdamW
    peak: float
    mathematics: dict[str, Any]  # the settings that decide the result
    facts: dict[
        str, Any
    ]  # for run.json: layers recomputed, and what memory and time are predicted to be
    start: int = 0
    total_tokens: int = 0
    total_targets: int = 0
    bad_steps: int = 0  # in a row, up to now
    seconds: float = 0.0  # of all steps so far
    background: AsyncWriter = field(
        default_factory=AsyncWriter
    )  # writes checkpoints where that is asked for
    notes: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(
        default_factory=dict
    )  # bytes of memory at the peak, seconds of the steps so far

    @property
    def trained(self) -> PreTrainedModel | PeftModel:
        """What is saved: the adapter where there is one, else the model."""
        return self.loss.model if self.adapted is None else self.adapted

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.run.folder / "checkpoints"

    def no_room(self) -> str:
        """What is to be said where the disk has no room for the trained model; empty where it has,
        on every rank.
        """
        trained, everything = trainable(self.loss)
        whole = everything * stored_dtype(self.config.model).itemsize
        needed = whole if self.adapted is None else trained * torch.float32.itemsize
        if self.config.adapter.merge:
            needed += whole
        lacks = distributed.is_main() and shortage(self.run.folder, needed)
        return distributed.broadcast(numbers(self.run.folder, needed) if lacks else "")


def longest_example(config: Config, model_config: Any) -> int:
    """`data.max_length`, or the model's positions up to 8,192 tokens."""
    positions = (
        getattr(model_config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH
    )
    return config.data.max_length or min(positions, DEFAULT_LENGTH)


def prepare(
    config: Config, machine: Machine, run: Run, progress: Progress, until_end: ExitStack
) -> Job:
    """Read and check everything a run needs. Bad data is found before the model is loaded.

    The processes join before the model is loaded, not earlier: encoding may take longer than they
    would wait for each other. They part when `until_end` closes.
    """
    _refuse_wrong_folder(config, run)
    max_length = longest_example(config, load_config(config.model))
    fast_tokenizer = Tokenizer.of_model(config.model)
    encoder = Encoder(fast_tokenizer, config.data, max_length)
    corpus, held_out = load_corpora(config, fast_tokenizer, max_length, progress.encoding)
    plan = plan_of(corpus, config)
    progress.data(corpus.ledger, None if held_out is None else held_out.ledger, plan.num_steps)
    _check_stop_token(corpus, encoder, config.data)
    until_end.enter_context(distributed.joined(machine.device, config.runtime.rank_timeout))
    run.facts = distributed.broadcast(run.facts)

    threads, said = settle_threads(config.runtime, machine.device, run.facts.get("threads"))
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    _check_same_tokens(fast_tokenizer, tokenizer, corpus)
    available, held = machine.available_memory()
    distributed.heartbeat("loading the model")
    loss, adapted, notes, shards = _build(config, machine, fast_tokenizer.added_token_ids)
    notes += said
    corpora = [some for some in (corpus, held_out) if some is not None]
    check_sizes(loss, max_length, max(some.largest_id for some in corpora))
    check_trainable(loss)
    probe = probe_pack([corpus.example(i) for i in range(min(len(corpus), 3))])
    longest = max(int(some.lengths.max(initial=1)) for some in corpora)
    set_example_cost(plan, loss, corpus.targets)
    load = StepProfile.of_plan(plan, int(corpus.targets.sum()), distributed.world_size())
    largest = largest_pack(config.runtime, machine.device, load)
    notes += check_paths(loss, probe, machine.precision, longest, largest)
    distributed.heartbeat("the plan of its memory")
    estimator = _estimator(config, machine, loss, held, shards, fast_tokenizer.added_token_ids)
    chosen, seconds = _choose_packing(config, run, corpus, plan, load, loss, estimator, available)
    notes += chosen.notes
    one_each = (
        distributed.is_joined() and not loss.paths.isolate
    )  # ranks must agree on the number of forward passes
    machine = replace(machine, tokens_per_pack=1 if one_each else chosen.tokens_per_pack)
    facts = {
        "threads": threads,
        "recomputed_layers": chosen.recomputed,
        "predicted": {"memory": chosen.parts(), "seconds": seconds},
    }
    optimizer, peak = (
        build_optimizer(loss, config.optim),
        peak_learning_rate(config.optim, config.adapter),
    )
    decides = mathematics(config, corpus.fingerprint, max_length, machine.precision)
    job = Job(
        config, machine, run, encoder, corpus, held_out, plan, loss, adapted, tokenizer, optimizer, peak, decides,
        facts, notes=notes,
    )  # fmt: skip
    _continue_or_start(job)
    if not run.finished and (lacking := job.no_room()):
        raise UserError(f"output: {run.folder}: there is no room for the trained model: {lacking}")
    progress.model(type(loss.model).__name__, trainable(loss), machine, job.peak, notes, job.start)
    return job


def _choose_packing(
    config: Config,
    run: Run,
    corpus: Corpus,
    plan: Plan,
    load: StepProfile,
    loss: PackLoss,
    estimator: MemoryEstimator,
    available: int,
) -> tuple[Packing, float | None]:
    """Choose packs and recomputed layers, compile where that is asked for or repays itself;
    predicted seconds too.
    """
    machine, wish = estimator.machine, config.runtime.compile
    estimator.compiled = not run.finished and planned(
        wish, machine.device, trainable(loss)[1], load.tokens
    )
    same_device = run.facts.get("device", "").partition(":")[0] == machine.device.type
    earlier = run.facts["tokens_per_pack"] if same_device else None
    chosen = choose_packing(config.runtime, estimator, load, available, earlier)
    seconds = seconds_of(
        estimator, load, chosen, CALIBRATION
    )  # of layers as they are, before they are compiled
    recompute(loss.model, chosen.recomputed)
    if estimator.compiled:
        members = plan.packs(0, chosen.tokens_per_pack)[0][0]
        said = compile_layers(
            loss, build_pack([corpus.example(i) for i in members], members), machine, wish
        )
        if not loss.paths.compiled:  # layers as they are hold more
            estimator.compiled = False
            chosen = choose_packing(config.runtime, estimator, load, available, earlier)
            recompute(loss.model, chosen.recomputed)
        chosen = replace(chosen, notes=(*chosen.notes, said))
    return chosen, seconds


def _estimator(
    config: Config,
    machine: Machine,
    loss: PackLoss,
    held: int,
    shards: int | None,
    added_token_ids: dict[int, bool],
) -> MemoryEstimator:
    shape = loss.train()
    if shards is not None:  # what is in shards cannot be rehearsed
        shape = meta_model(config, added_token_ids)
        shape.take(Paths(loss.paths.isolate, loss.paths.transform))
    return MemoryEstimator(
        shape, machine, held, shards, config.adapter.quantize == "nf4" and shape is not loss
    )


def _kept_weights(config: Config, machine: Machine) -> tuple[torch.dtype, list[str]]:
    """The dtype of the parameters, and what is to be said of it."""
    if config.optim.weights == "fp32":
        return torch.float32, []
    if machine.precision == torch.float32:
        raise UserError(
            f"optim.weights: {config.optim.weights} computes in bf16; set runtime.precision: bf16 "
            "too"
        )
    return torch.bfloat16, [
        "weights are bf16 without an fp32 copy: updates are rounded at random (optim.weights)"
    ]


def _build(
    config: Config, machine: Machine, added_token_ids: dict[int, bool]
) -> tuple[PackLoss, PeftModel | None, list[str], int | None]:
    """The model with its adapter, on the device, in shards where there are several ranks; notes in
    words; and over how many ranks the shards are, None without any.
    """
    nf4 = machine.precision if config.adapter.quantize == "nf4" else None
    dtype, notes = _kept_weights(config, machine)
    unread, layout = None, ""
    if distributed.is_joined():
        unread = unread_model(config.model, dtype)
        weights = trainable(unread.model)[1]
        layout = choose_layout(
            config.runtime, machine.device, weights, weights * (config.adapter.method == "none")
        )
        # New rows and DoRA's magnitudes are made from the weights, NF4 by transformers: all three
        # need them at hand.
        if (
            layout == "replicate"
            or added_token_ids
            or nf4 is not None
            or config.adapter.method == "dora"
        ):
            unread = None
        elif not unread.complete:
            notes.append(
                "the files name the weights otherwise than the model: every process reads all of "
                "them"
            )
            unread = None
    if unread is not None:
        model = unread.model
    else:
        model = load_model(
            config.model,
            torch.device("cpu") if layout and nf4 is None else machine.device,
            dtype,
            nf4,
        )
    adapted, more = choose_weights(
        model, config.model, config.adapter, config.seed, added_token_ids
    )
    loss, notes = PackLoss(model, config.loss), [*notes, *more]
    if not distributed.is_joined():
        cast_frozen_weights(model, machine.precision)
        return loss, adapted, notes, None
    mesh = build_mesh(layout, machine.device, config.runtime.rank_timeout)
    shard(loss, mesh, machine.precision)
    if unread is not None:
        unread.read()
    return loss, adapted, notes, mesh.size(1)


def refuse_strangers(config: Config) -> None:
    """UserError where the output folder holds files and no run of sftx: some would be overwritten."""
    source, target = Path(config.model.path), Path(config.output)
    if not target.is_dir():
        return
    if source.exists() and source.resolve() == target.resolve():
        raise UserError(
            f"output: {target} is the folder of the model itself; choose another, it would be "
            "overwritten"
        )
    if (target / "run.json").exists():
        return
    # A run that ended before its record was begun leaves no more than these.
    strangers = sorted(
        path.name for path in target.iterdir() if path.name.removesuffix(".tmp") not in OWN
    )
    if strangers:
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        raise UserError(
            f"output: {target} holds {shown} and no run of sftx; its files could be overwritten. "
            "Choose a folder that "
            "is empty or not there yet"
        )


def _refuse_wrong_folder(config: Config, run: Run) -> None:
    refuse_strangers(config)
    target = run.folder
    run.check()
    if config.checkpoint.resume == "must" and not run.exists:
        raise UserError(f"checkpoint.resume: must, but there is no run in {target}")
    if config.checkpoint.resume == "never" and run.exists:
        raise UserError(
            f"checkpoint.resume: never, but {target} holds a run; choose another output folder"
        )


def _check_stop_token(corpus: Corpus, encoder: Encoder, data: Data) -> None:
    """The model must be taught to stop: a stop token is among the targets.

    Rows of tokens or segments say themselves what is learned; naming that format takes the
    responsibility.
    """
    stops = set(encoder.tokenizer.stop_ids) | (
        set() if encoder.stop_id is None else {encoder.stop_id}
    )
    if data.format in ("tokens", "segments"):
        return
    for i in reversed(
        range(len(corpus))
    ):  # from the end: the stop token of a document cut in pieces is in the last
        example = corpus.example(i)
        if np.isin(example.ids[example.weights > 0], list(stops)).any():
            return
    found = f"no target is a stop token ({' or '.join(map(str, sorted(stops)))})"
    why = "the tokenizer has no EOS token" if encoder.tokenizer.eos_id is None else found
    raise UserError(
        f"{why}: the model would never learn to stop. If the rows are meant so, say data.format: "
        "tokens (or segments)"
    )


def _check_same_tokens(fast: Tokenizer, served: Any, corpus: Corpus) -> None:
    """Training and serving must cut text into the same tokens."""
    texts = [fast.decode(corpus.example(i).ids[:200].tolist()) for i in range(min(len(corpus), 5))]
    for text in texts:
        ours = list(fast.encode_batch([text])[0])
        theirs = list(served(text, add_special_tokens=False)["input_ids"])
        if ours != theirs:
            raise UserError(
                "model.tokenizer: tokenizer.json and the class transformers loads for it cut a "
                "text differently, so a "
                f"server would not see what was trained: {text[:60]!r} -> {ours[:12]} and "
                f"{theirs[:12]}"
            )


def _check_ranks(job: Job) -> None:
    """All ranks train on the same data with the same settings, in equally many packs."""
    mine = {**dotted(job.mathematics), "tokens per pack": job.machine.tokens_per_pack}
    for rank, theirs in enumerate(held := distributed.all_gather(mine)):
        if odd := [
            f"{key}: {theirs[key]!r}, not {value!r}"
            for key, value in held[0].items()
            if theirs[key] != value
        ]:
            raise UserError(f"rank {rank} has other settings or data than rank 0: {'; '.join(odd)}")


def _continue_or_start(job: Job) -> None:
    """Set `job.start`: 0, the step of the newest good checkpoint, or the end of a finished run."""
    run = job.run
    facts: dict[str, Any] = {}
    distributed.heartbeat("looking for a checkpoint")
    _check_ranks(job)
    changed = changes(job.config, run, job.mathematics)
    if run.finished and not changed:
        job.start = job.plan.num_steps
        job.notes += run.unreadable() + _write_ledger(job, again=True)
        return
    carried: dict[str, str] = {}
    if run.exists:
        state = checkpoint.restore(job.checkpoints, job.loss, job.optimizer)
        if state is not None:
            assert changed or state.plan == job.plan.fingerprint, (
                "equal settings and data give an equal plan"
            )
            job.start, job.total_tokens, job.total_targets = (
                state.step,
                state.total_tokens,
                state.total_targets,
            )
            job.bad_steps, job.seconds = state.bad_steps, state.seconds
            facts = {key: run.facts[key] for key in ("eval_before", "changed") if key in run.facts}
            carried = checkpoint.records(job.checkpoints, state.step) if run.writes else {}
            job.notes += run.unlike(state.step, carried) if run.writes else []
        if changed and not 0 < job.start <= job.plan.num_steps:
            found = f"the one of step {job.start}" if job.start else "none"
            raise UserError(
                f"checkpoint.resume_allow: {run.folder} has no checkpoint to continue "
                f"{job.plan.num_steps} steps from "
                f"(found: {found}); choose another folder for a new run"
            )
        if not job.start and (lost := [line["step"] for line in run.metrics() if line["step"]]):
            found = (
                "left no checkpoint that can be used"
                if any(job.checkpoints.glob("step-*"))
                else "saved nothing"
            )
            job.notes.append(
                f"an earlier run stopped after step {lost[-1]:,} and {found}: starting over"
            )
    if changed:
        job.notes.extend(
            f"from step {job.start + 1:,} on, {key} is {new!r} (was {old!r})"
            for key, (old, new) in changed.items()
        )
        facts["changed"] = [*facts.get("changed", []), {"step": job.start, **changed}]
    again = run.exists and not changed
    run.start(
        job.start,
        carried,
        mathematics=job.mathematics,
        plan=job.plan.fingerprint,
        num_steps=job.plan.num_steps,
        device=str(job.machine.device),
        precision=name_of(job.machine.precision),
        parameters=dict(zip(("trainable", "all"), trainable(job.loss), strict=True)),
        tokens_per_pack=job.machine.tokens_per_pack,
        notes=job.notes,
        peak_learning_rate=job.peak,
        stop_id=job.encoder.stop_id,
        **job.facts,
        **facts,
    )
    job.notes += _write_ledger(job, again)


def _write_ledger(job: Job, again: bool) -> list[str]:
    """Write the ledger; with `again` it was written before, and a line says what had to be mended."""
    if not job.run.writes:
        return []
    names = write_ledger(job.corpus, job.run.folder)
    if not (names and again):
        return []
    return [
        f"{' and '.join(names)} did not hold what this data gives (lost, damaged or older): "
        "written anew"
    ]
