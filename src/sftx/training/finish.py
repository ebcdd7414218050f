"""The end of a run: the last evaluation, and the trained model in its folder."""

from __future__ import annotations

from typing import NoReturn

from safetensors import SafetensorError
from torch import Tensor

from sftx import distributed
from sftx.model.save import save_model
from sftx.model.shard import check_replicas, whole_state
from sftx.report.model_card import model_card
from sftx.report.progress import Progress
from sftx.training import checkpoint
from sftx.training.best import best_step, chosen_by
from sftx.training.job import Job
from sftx.training.signals import Stopped
from sftx.types import UserError


def leave(job: Job) -> NoReturn:
    """End a run that a signal stopped and that is saved."""
    job.writer.wait()
    job.run.update(status="stopped", stopped_at=job.state.step)
    raise Stopped(
        f"stopped by signal {job.stop.signal} after step {job.state.step}; saved. Run the same "
        "command to continue."
    )


def finish(job: Job, progress: Progress) -> None:
    """Evaluate for the last time, write the model into the folder, and mark the run as finished."""
    run = job.run
    state = job.state
    job.writer.wait()
    _evaluate_last(job, progress)
    written = _take_best(job, progress)
    if job.evaluates:
        run.update(eval_after=job.evaluations[written])
    progress.phase("saving the model")
    tensors = _whole_tensors(job) if distributed.is_joined() else None
    problem = job.no_room()
    try:
        if distributed.is_main() and not problem:
            _write_model(job, tensors)
    except (OSError, SafetensorError) as error:
        problem = str(error)
    problem = distributed.broadcast(problem)
    if problem:
        rescued = _rescue(job, is_last=written == state.step)
        raise UserError(f"{run.folder}: the model cannot be written ({problem}); {rescued}")
    run.records()  # a finished run has all of them
    measured = {}
    if job.peak_memory is not None:
        measured = {"memory": job.peak_memory, "seconds": state.seconds}
    run.update(
        status="finished",
        measured=measured,
        total_tokens=state.total_tokens,
        total_targets=state.total_targets,
    )
    progress.finished(run)


def _evaluate_last(job: Job, progress: Progress) -> None:
    """Evaluate after the last step, unless the evaluation of just now has ended the run."""
    run = job.run
    step = job.state.step
    is_early = step < job.plan.num_steps
    why = job.gave_up if is_early else ""
    if is_early:
        run.update(ended_at=step, stopped_early=why or None)
    if why:
        progress.say(f"stopped  after step {step:,}: {why}")
    if why or not job.evaluates:
        return
    after = job.evaluate()
    if job.stop():
        job.save()
        leave(job)
    run.write_evaluation(step, job.plan.num_steps, after)
    progress.evaluated(step, after)
    progress.samples(job.samples)


def _take_best(job: Job, progress: Progress) -> int:
    """Put back the weights of the best evaluation where `eval.keep_best` asks for them; returns the
    step of the weights that are written.
    """
    run = job.run
    last = job.state.step
    wanted = chosen_by(job.config.eval)
    if wanted is None:
        return last
    there = {checkpoint.step_of(path) for path in checkpoint.folders(job.checkpoints)}
    there = distributed.broadcast(there | {last})
    seen = {step: numbers for step, numbers in job.evaluations.items() if step in there}
    best = best_step(seen, wanted)
    if best is None:
        progress.say(f"warning  no evaluation has {wanted}: the last model is written")
        return last
    if best != last:
        checkpoint.load_weights(job.checkpoints / f"step-{best:08d}", job.loss)
    value = seen[best][wanted]
    run.update(best={"step": best, "metric": wanted, "value": value})
    progress.say(
        f"best     the model after step {best:,} of {last:,} is written: {wanted} {value:.4g}"
    )
    return best


def _whole_tensors(job: Job) -> dict[str, Tensor]:
    """The tensors of the trained model, on the main rank."""
    named = job.loss.named_parameters()
    check_replicas({name: p.detach() for name, p in named if p.requires_grad})
    if job.adapted is None:
        return whole_state(job.trained, job.save_dtype, trained_only=False)
    return whole_state(job.trained, None, trained_only=True)


def _rescue(job: Job, is_last: bool) -> str:
    """Save the state where the model could not be written, and `is_last`, the model after the last
    step, is still there; returns what there is to continue from.
    """
    try:
        if not is_last:
            raise UserError("the weights are those of an earlier step")
        job.save()
    except UserError:
        newest = checkpoint.newest(job.checkpoints) if distributed.is_main() else None
        good = distributed.broadcast(newest)
    else:
        return (
            "the state after the last step is saved: make room, then run the same command to "
            "write the model"
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


def _write_model(job: Job, tensors: dict[str, Tensor] | None) -> None:
    """The trained model as a folder that serves; `tensors` = its own, where they were in shards."""
    encoder = job.encoder
    job.loss.use_segments(False)  # the saved configuration must not name our attention
    job.loss.model.config.use_cache = True
    if encoder.chat_template is not None:
        job.tokenizer.chat_template = encoder.chat_template
    stop_ids = sorted(encoder.stop_ids, key=lambda stop: (stop != encoder.stop_id, stop))
    card = model_card(job.run, job.corpus.sources, job.corpus.ledger)
    save_model(job.run.folder, job.trained, job.tokenizer, stop_ids, card, job.save_dtype, tensors)
