"""The loop: a generator over optimiser steps, and `train`, which runs it to its end."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack, overload

import torch
from safetensors import SafetensorError
from torch import Tensor

from sftx import distributed
from sftx.data.pack import build_pack
from sftx.data.prefetch import prefetched
from sftx.eval.loss import held_out_loss
from sftx.model.load import stored_dtype
from sftx.model.pack_loss import TensorPack, to_tensors
from sftx.model.runtime import machine
from sftx.model.save import save_model
from sftx.model.shard import check_replicas, whole_state
from sftx.report.lock import owned
from sftx.report.model_card import model_card
from sftx.report.progress import Progress
from sftx.report.record import Run
from sftx.settings.load import make_config
from sftx.settings.schema import Config
from sftx.training import checkpoint
from sftx.training.async_writer import AsyncWriter
from sftx.training.control import Control, Steps
from sftx.training.export import Allowed, export
from sftx.training.given_model import GivenModel, without_object
from sftx.training.metrics import StepMetrics
from sftx.training.optim import StochasticAdamW, learning_rate
from sftx.training.prepare import Job, prepare, refuse_strangers
from sftx.training.repeat import write_settings
from sftx.training.result import Result
from sftx.training.signals import NOTHING_TO_SAVE, SaveClock, StopFlag, Stopped, listening
from sftx.training.step import StepResult, train_step
from sftx.types import StepRecord, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx.settings.keywords import Sections


@overload
def train(config: Config) -> Result: ...
@overload
def train(
    config: None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **sections: Unpack[Sections],
) -> Result: ...
def train(config: Config | None = None, **sections: Any) -> Result:
    """Run to the end and write the trained model to `output`.

    Takes a `Config`, or its sections by name: `train(model="folder", data=["a text", ...],
    output="runs/first", batch={"epochs": 2})`. `model` may be an object of transformers, with
    `tokenizer`: it is written into the run's folder, from which the run starts, and stays as it is;
    the trained one is `Result.model`.

    Raises UserError for a mistake in them; exits with code 75 when stopped by a signal (run the
    same again to continue) and 3 when the loss is not finite.
    """
    config, given = _one_config(config, sections)
    control = Control(exact=False)
    run = Steps(config, control, _run(config, given, control))
    for _ in run:
        pass
    return run.result


@overload
def steps(config: Config) -> Steps: ...
@overload
def steps(
    config: None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **sections: Unpack[Sections],
) -> Steps: ...
def steps(config: Config | None = None, **sections: Any) -> Steps:
    """Train under the caller's control: an iterator of one record per optimiser step; see `Steps`.

    Takes what `train` takes. The model is written when the iterator is exhausted. Between two steps
    the device has nothing to do, where `train` already computes the next one: on a GPU, `train` is
    a little faster.
    """
    config, given = _one_config(config, sections)
    control = Control(exact=True)
    return Steps(config, control, _run(config, given, control))


def _run(
    config: Config, given: GivenModel | None, control: Control
) -> Generator[StepRecord | None]:
    """The whole run: None once it is prepared, then its records."""
    refuse_strangers(config)
    with owned(Path(config.output)) if distributed.is_main() else nullcontext():
        run = Run(config, writes=distributed.is_main())
        yield from _train(config, given, run, control)
        if (
            config.adapter.merge and "merged" not in run.facts and distributed.is_main()
        ):  # the others need not wait
            moved, _ = export(
                run.folder, run.folder / "merged", allowed=Allowed.of(config)
            )  # the base, anew and whole
            run.update(merged=moved)


def _train(
    config: Config, given: GivenModel | None, run: Run, control: Control
) -> Generator[StepRecord | None]:
    with ExitStack() as stack:
        here = stack.enter_context(machine(config.runtime))
        stop = stack.enter_context(listening())
        progress = stack.enter_context(Progress(config.runtime.progress and distributed.is_main()))
        stop.at_once = True
        if given is not None:
            given.write()
        job = prepare(config, here, run, progress, stack)
        stop.at_once = False
        control.begin(
            job, partial(_evaluate_now, job, stop, control), partial(_save_now, job, control)
        )
        yield None
        if run.finished:
            progress.say(f"done     {run.folder} is finished already: no step was taken")
        else:
            if run.writes:
                write_settings(run.folder, config)
            progress.time(job.facts["predicted"]["seconds"])
            _evaluate_first(job, stop, progress)
            for record in _steps(job, stop, control):
                progress.step(record)
                yield run.write(record)
            _finish(job, stop, progress, control.done)
        control.job = None
        del job


def _steps(job: Job, stop: StopFlag, control: Control) -> Iterator[StepRecord]:
    """The steps from `job.start` on, with evaluation and checkpoints when due.

    Records come one step late, so that reading them never makes the device wait; where the caller
    has control, at once.
    """
    config, plan = job.config, job.plan
    meter, clock = StepMetrics(job), SaveClock(config.checkpoint.minutes)
    pending: tuple[int, StepResult, float] | None = None
    for step, packs in prefetched(range(job.start, plan.num_steps), lambda step: _packs(job, step)):
        if control.must_end():
            return
        distributed.heartbeat(f"step {step + 1}")
        result = _step(job, step, packs)
        control.done = step + 1
        if pending is not None:
            yield meter.read(*pending)
        pending = (step, result, time.perf_counter())
        job.background.check()
        last, done = step + 1 == plan.num_steps, step + 1
        eval_due = _eval_due(job, done)
        save_due = not last and _due(config.checkpoint.every, done)
        asked, time_due = stop.or_save(distributed.is_main() and clock.due())
        if not (eval_due or save_due or last or control.exact or asked or time_due):
            continue
        record = meter.read(step, result, None)
        pending = None
        if eval_due:
            record.eval = _evaluate(job, stop) or None
        yield record
        stopping = stop()
        by_time = time_due and not last
        if save_due or stopping or by_time:
            background = job.background if config.checkpoint.background else None
            _save(
                job, done, record.eval, background, optional=by_time and not (save_due or stopping)
            )
            clock.restart()
        if stopping:
            _leave(job, stop, done)
        meter.restart()


def _packs(job: Job, step: int) -> list[TensorPack]:
    """The packs of `step` on their way to the device."""
    bins = job.plan.packs(step, job.machine.tokens_per_pack, distributed.world_size())[
        distributed.rank()
    ]
    return [
        to_tensors(
            build_pack([job.corpus.example(i) for i in members], members), job.machine.device
        )
        for members in bins
    ]


def _step(job: Job, step: int, packs: list[TensorPack]) -> StepResult:
    """Launch step `step` (0-based)."""
    # Dropout draws from a stream of its own in every step, so a continued run needs no generator
    # state.
    job.loss.noise_seed = (job.config.seed * 1_000_003 + step) % 2**63
    torch.manual_seed((job.loss.noise_seed + (distributed.rank() << 40)) % 2**63)
    if isinstance(job.optimizer, StochasticAdamW):
        job.optimizer.seed = job.loss.noise_seed
    return train_step(
        job.loss,
        job.optimizer,
        packs,
        job.plan.total_weight(step),
        learning_rate(step, job.plan.num_steps, job.config.optim, job.peak),
        job.config.optim.max_grad_norm,
        job.machine.autocast,
    )


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _eval_due(job: Job, done: int) -> bool:
    return (
        job.held_out is not None and done < job.plan.num_steps and _due(job.config.eval.every, done)
    )


def _evaluate_first(job: Job, stop: StopFlag, progress: Progress) -> None:
    """The evaluation before the first step: that of the model as it came, or one that a signal cut
    short.
    """
    run = job.run
    missed = job.start > 0 and _eval_due(job, job.start)
    missed = distributed.broadcast(
        missed and distributed.is_main() and run.metrics()[-1]["eval"] is None
    )
    if not missed and not (
        job.start == 0 and job.config.eval.at_start and job.held_out is not None
    ):
        return
    numbers = _evaluate(job, stop)
    if stop():
        run.update(status="stopped", stopped_at=job.start)
        raise Stopped(NOTHING_TO_SAVE.format(stop.signal))
    run.write_evaluation(job.start, job.plan.num_steps, numbers)
    if not missed:
        run.update(eval_before=numbers)
    progress.evaluated(job.start, numbers)


def _evaluate(job: Job, stop: StopFlag) -> dict[str, float]:
    assert job.held_out is not None
    return held_out_loss(
        job.loss, job.held_out, job.machine.tokens_per_pack, job.machine.autocast, stop
    )


def _evaluate_now(job: Job, stop: StopFlag, control: Control) -> dict[str, float]:
    """The held-out loss between two steps, at the caller's wish."""
    numbers = _evaluate(job, stop)
    if numbers:  # else a signal cut it short
        job.run.write_evaluation(control.done, job.plan.num_steps, numbers)
    return numbers


def _save_now(job: Job, control: Control) -> Path:
    """A checkpoint between two steps, at the caller's wish."""
    lines = job.run.metrics()
    background = job.background if job.config.checkpoint.background else None
    return _save(job, control.done, lines[-1]["eval"] if lines else None, background)


def _save(
    job: Job,
    done: int,
    evaluated: dict[str, float] | None,
    background: AsyncWriter | None = None,
    optional: bool = False,
) -> Path:
    state = checkpoint.State(
        step=done,
        plan=job.plan.fingerprint,
        mathematics=job.mathematics,
        total_tokens=job.total_tokens,
        total_targets=job.total_targets,
        held_out_loss=evaluated["loss"] if evaluated else None,
        bad_steps=job.bad_steps,
        seconds=job.seconds,
    )
    keep, records = job.config.checkpoint.keep, job.run.records()
    return checkpoint.save(
        job.checkpoints, state, job.loss, job.optimizer, keep, background, records, optional
    )


def _leave(job: Job, stop: StopFlag, done: int) -> NoReturn:
    job.background.wait()
    job.run.update(status="stopped", stopped_at=done)
    raise Stopped(
        f"stopped by signal {stop.signal} after step {done}; saved. Run the same command to "
        "continue."
    )


def _finish(job: Job, stop: StopFlag, progress: Progress, done: int) -> None:
    """Last evaluation, the model in its folder, and the run, which took `done` steps, marked
    finished.
    """
    job.background.wait()
    if done < job.plan.num_steps:
        job.run.update(ended_at=done)
    if job.held_out is not None:
        after = _evaluate(job, stop)
        if stop():
            _save(job, done, None)
            _leave(job, stop, done)
        job.run.update(eval_after=after)
        job.run.write_evaluation(done, job.plan.num_steps, after)
        progress.evaluated(done, after)
    state = None
    if distributed.is_joined():
        check_replicas({n: p.detach() for n, p in job.loss.named_parameters() if p.requires_grad})
        adapted = job.adapted is not None
        state = whole_state(
            job.trained, None if adapted else stored_dtype(job.config.model), trained_only=adapted
        )
    problem = job.no_room()
    try:
        if distributed.is_main() and not problem:
            _write_model(job, state)
    except (OSError, SafetensorError) as error:
        problem = str(error)
    if problem := distributed.broadcast(problem):
        raise UserError(
            f"{job.run.folder}: the model cannot be written ({problem}); {_rescue(job, done)}"
        )
    job.run.records()  # a finished run has all of them
    job.run.update(
        status="finished",
        measured=job.measured,
        total_tokens=job.total_tokens,
        total_targets=job.total_targets,
    )
    progress.finished(job.run)


def _rescue(job: Job, done: int) -> str:
    """Save the state, for there is no model; returns what there is to continue from."""
    try:
        _save(job, done, None)
        return (
            "the state after the last step is saved: make room, then run the same command to "
            "write the model"
        )
    except UserError:
        good = distributed.broadcast(
            checkpoint.newest(job.checkpoints) if distributed.is_main() else None
        )
    if good is None:
        return (
            "there is no room for its state either, and no checkpoint: make room, then run the "
            "same command again"
        )
    return (
        f"the newest checkpoint is that of step {good.step:,}: make room, then run the same "
        "command to continue"
    )


def _write_model(job: Job, state: dict[str, Tensor] | None) -> None:
    """The trained model as a folder that serves; `state` = its tensors, where they were sharded."""
    job.loss.use_segments(False)  # the saved configuration must not name our attention
    job.loss.model.config.use_cache = True
    if job.encoder.chat_template is not None:
        job.tokenizer.chat_template = job.encoder.chat_template
    stop_ids = sorted(job.encoder.stop_ids, key=lambda stop: (stop != job.encoder.stop_id, stop))
    card = model_card(job.run, job.corpus.sources, job.corpus.ledger)
    save_model(
        job.run.folder,
        job.trained,
        job.tokenizer,
        stop_ids,
        card,
        stored_dtype(job.config.model),
        state,
    )


def _one_config(
    config: Config | None, sections: dict[str, Any]
) -> tuple[Config, GivenModel | None]:
    """The settings, and a model that was given as an object."""
    if config is None:
        named, given = without_object(sections)
        return make_config(**named), given
    if sections:
        raise UserError(
            f"give either a Config or its sections, not both (got {', '.join(sections)})"
        )
    return config, None
