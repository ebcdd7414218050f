"""The loop: a generator over optimiser steps, and `train`, which runs it to its end."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import torch

from sftx import distributed
from sftx.data.prefetch import prefetched
from sftx.model.pack_loss import TensorPack
from sftx.model.runtime import machine
from sftx.report.live import live_report
from sftx.report.lock import owned
from sftx.report.progress import Progress, working
from sftx.report.record import Run
from sftx.report.trackers import check_installed, tracking
from sftx.settings.make import make_config
from sftx.settings.schema import Config
from sftx.training.build import prepare
from sftx.training.control import Control, Steps
from sftx.training.finish import finish, leave
from sftx.training.given_model import GivenModel, without_object
from sftx.training.job import Job
from sftx.training.merging import trained_by, write_merged
from sftx.training.metrics import StepMetrics
from sftx.training.mirror import Mirror
from sftx.training.optim import StochasticAdamW
from sftx.training.repeat import write_settings
from sftx.training.result import Result
from sftx.training.run_identity import refuse_other_files
from sftx.training.signals import NOTHING_TO_SAVE, SaveClock, Stopped, listening
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
    refuse_other_files(config)
    check_installed(config.track)
    with owned(Path(config.output)) if distributed.is_main() else nullcontext():
        mirror = _mirror(config)
        run = Run(config, writes=distributed.is_main())
        with ExitStack() as stack:
            here = stack.enter_context(machine(config.runtime))
            stop = stack.enter_context(listening())
            shown = config.runtime.progress and distributed.is_main()
            progress = stack.enter_context(Progress(shown))
            stop.at_once = True
            if given is not None:
                given.write()
            control.job = prepare(config, here, run, progress, stack, stop)
            control.job.mirror = mirror
            if mirror is not None:
                # Whatever ends the run: a checkpoint on its way arrives.
                stack.callback(mirror.finish, whole=False)
            stack.enter_context(control.job.writer)
            stop.at_once = False
            stack.enter_context(tracking(run, config.track, progress.say))
            yield None
            with live_report(control.job, progress) as report:
                for record in _train(control.job, control, progress):
                    yield record
                    report.after(record)
            control.job = None  # the model is no longer needed
        # The other ranks need not wait for this.
        if config.adapter.merge and distributed.is_main():
            _merge(config, run)
        if mirror is not None and run.finished:
            with working("sending the run to its mirror", config.runtime.progress):
                mirror.finish(whole=True)


def _merge(config: Config, run: Run) -> None:
    """Write the model with its adapter merged, where that was not done yet."""
    if run.facts.merged is not None:
        return
    with working("merging the adapter", config.runtime.progress):
        moved, _ = write_merged(trained_by(run), run.folder / "merged")
    run.update(merged=moved)


def _mirror(config: Config) -> Mirror | None:
    """The copy of the run elsewhere, on the main rank. A run that is there and not here is brought
    here first.
    """
    url = config.checkpoint.mirror
    if url is None or not distributed.is_main():
        return None
    mirror = Mirror(
        url, Path(config.output), lambda text: print(f"warning: {text}", file=sys.stderr)
    )
    if config.checkpoint.resume == "never" or (mirror.folder / "run.json").exists():
        return mirror
    step = mirror.fetch()
    if step is not None:
        print(
            f"the run was brought here from {url}, where it stands at step {step:,}",
            file=sys.stderr,
        )
    return mirror


def _train(job: Job, control: Control, progress: Progress) -> Iterator[StepRecord]:
    """The records of a prepared run, from its first evaluation to the model in its folder."""
    run = job.run
    if run.finished:
        progress.say(f"done     {run.folder} is finished already: no step was taken")
        return
    if run.writes:
        write_settings(run.folder, job.config)
    progress.time(job.predicted_seconds)
    _evaluate_first(job, progress)
    for record in take_steps(job, control):
        progress.step(record)
        if record.eval is not None:
            progress.samples(job.samples)
        yield run.write(record)
    finish(job, progress)


def take_steps(job: Job, control: Control) -> Iterator[StepRecord]:
    """The steps that are left, with evaluation and checkpoints when due.

    Records come one step late, so that reading them never makes the device wait; where the caller
    has control, at once.
    """
    num_steps = job.plan.num_steps
    metrics = StepMetrics(job)
    clock = SaveClock(job.config.checkpoint.minutes)
    pending: tuple[int, int, StepResult, float] | None = None
    for step, packs in prefetched(range(job.state.step, num_steps), job.packs):
        if control.must_end() or job.gave_up:
            return
        distributed.heartbeat(f"step {step + 1}")
        result = _step(job, step, packs.own)
        if pending is not None:
            yield metrics.read(*pending)
        pending = (step, packs.count, result, time.perf_counter())
        job.writer.check()
        asked, time_due = job.stop.or_save(clock.due())
        must_read = control.exact or _must_read(job, step + 1)
        if not (must_read or asked or time_due):
            continue
        record = metrics.read(step, packs.count, result, None)
        pending = None
        _evaluate_if_due(job, record)
        yield record
        if _save_if_due(job, record, time_due):
            clock.restart()
        metrics.restart()


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
        job.learning_rate(step),
        job.config.optim.max_grad_norm,
        job.machine.autocast,
    )


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _eval_due(job: Job, done: int) -> bool:
    return job.evaluates and done < job.plan.num_steps and _due(job.config.eval.every, done)


def _save_due(job: Job, done: int) -> bool:
    return done < job.plan.num_steps and _due(job.config.checkpoint.every, done)


def _evaluate_if_due(job: Job, record: StepRecord) -> None:
    if _eval_due(job, record.step):
        record.eval = job.evaluate() or None


def _must_read(job: Job, done: int) -> bool:
    """Whether the record of the step after which `done` are taken must be read before the next."""
    return done == job.plan.num_steps or _eval_due(job, done) or _save_due(job, done)


def _save_if_due(job: Job, record: StepRecord, time_due: bool) -> bool:
    """Save after the step of `record` where that is due; end the run where a signal asks for it.
    Returns whether there was a save.
    """
    stopping = job.stop()
    needed = _save_due(job, record.step) or stopping
    if record.step < job.plan.num_steps:
        needed = needed or job.is_best
    by_time = time_due and record.step < job.plan.num_steps
    if needed or by_time:
        job.save(in_background=True, optional=not needed)
    if stopping:
        leave(job)
    return needed or by_time


def _evaluate_first(job: Job, progress: Progress) -> None:
    """The evaluation before the first step: that of the model as it came, or one that a signal cut
    short.
    """
    run = job.run
    step = job.state.step
    missed = step > 0 and _eval_due(job, step) and step not in job.evaluations
    at_start = step == 0 and job.config.eval.at_start and job.evaluates
    if job.judge is not None:
        job.remember_base()
        _end_if_asked(job)
    if not missed and not at_start:
        return
    numbers = job.evaluate()
    _end_if_asked(job)
    run.write_evaluation(step, job.plan.num_steps, numbers)
    if at_start:
        run.update(eval_before=numbers)
    progress.evaluated(step, numbers)
    progress.samples(job.samples)


def _end_if_asked(job: Job) -> None:
    """End a run that a signal stops before a step was taken."""
    if job.stop():
        job.run.update(status="stopped", stopped_at=job.state.step)
        raise Stopped(NOTHING_TO_SAVE.format(job.stop.signal))


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
