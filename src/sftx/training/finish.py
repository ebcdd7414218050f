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
    run, state = job.run, job.state
    job.writer.wait()
    if state.step < job.plan.num_steps:
        run.update(ended_at=state.step)
    if job.held_out is not None:
        after = job.evaluate()
        if job.stop():
            job.save(None)
            leave(job)
        run.update(eval_after=after)
        run.write_evaluation(state.step, job.plan.num_steps, after)
        progress.evaluated(state.step, after)
    progress.phase("saving the model")
    tensors = _whole_tensors(job) if distributed.is_joined() else None
    problem = job.no_room()
    try:
        if distributed.is_main() and not problem:
            _write_model(job, tensors)
    except (OSError, SafetensorError) as error:
        problem = str(error)
    if problem := distributed.broadcast(problem):
        raise UserError(f"{run.folder}: the model cannot be written ({problem}); {_rescue(job)}")
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


def _whole_tensors(job: Job) -> dict[str, Tensor]:
    """The tensors of the trained model, on the main rank."""
    check_replicas({n: p.detach() for n, p in job.loss.named_parameters() if p.requires_grad})
    if job.adapted is None:
        return whole_state(job.trained, job.save_dtype, trained_only=False)
    return whole_state(job.trained, None, trained_only=True)


def _rescue(job: Job) -> str:
    """Save the state where the model could not be written; returns what there is to continue from."""
    try:
        job.save(None)
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
