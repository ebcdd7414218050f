"""From the outcome of a step, still on the device, to its record; and the end of a run whose
numbers are not finite.
"""

from __future__ import annotations

import time
from itertools import chain

from sftx import distributed
from sftx.training import checkpoint
from sftx.training.eta import Eta
from sftx.training.optim import learning_rate
from sftx.training.prepare import Job
from sftx.training.signals import Diverged
from sftx.training.step import StepResult
from sftx.types import StepRecord


class StepMetrics:
    """Reads steps in their order, and counts time, tokens and bad steps."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.eta = Eta(job.plan)
        job.machine.forget_peak()
        self.restart()

    def restart(self) -> None:
        """The next step begins now: what happened since the last one is not its time."""
        self.clock = time.perf_counter()

    def read(self, step: int, result: StepResult, launched: float | None) -> StepRecord:
        """The record of `step` (0-based); waits for the device if it is not done.

        `launched` is when its last kernel was launched, for a step that is read while the next one
        computes; None where the step is read at once. Raises Diverged when too many steps in a row
        were not finite.
        """
        job, plan = self.job, self.job.plan
        loss, grad_norm, bad = result.read()
        now = time.perf_counter() if launched is None else launched
        seconds, self.clock = now - self.clock, now
        job.seconds += seconds
        memory = job.machine.memory()
        job.measured = {"memory": memory, "seconds": job.seconds}
        chosen = plan.examples(step)
        tokens, targets = (
            int(job.corpus.lengths[chosen].sum()),
            int(job.corpus.targets[chosen].sum()),
        )
        job.total_tokens += tokens
        job.total_targets += targets
        job.bad_steps = job.bad_steps + 1 if bad else 0
        if bad:
            job.run.bad_step(step + 1, loss, grad_norm, [job.corpus.place(int(i)) for i in chosen])
            self._stop_if_lost(step, loss, grad_norm)
        return StepRecord(
            step=step + 1,
            num_steps=plan.num_steps,
            epoch=plan.epoch(step),
            loss=None if bad else loss,
            learning_rate=learning_rate(step, plan.num_steps, job.config.optim, job.peak),
            grad_norm=None if bad else grad_norm,
            examples=len(chosen),
            tokens=tokens,
            targets=targets,
            weight=plan.total_weight(step),
            packs=sum(
                map(
                    bool,
                    chain(*plan.packs(step, job.machine.tokens_per_pack, distributed.world_size())),
                )
            ),
            seconds=seconds,
            tokens_per_second=tokens / max(seconds, 1e-9),
            memory=memory,
            total_tokens=job.total_tokens,
            total_targets=job.total_targets,
            seconds_left=self.eta.after(step, seconds),
        )

    def _stop_if_lost(self, step: int, loss: float, grad_norm: float) -> None:
        job = self.job
        if job.bad_steps <= job.config.optim.max_bad_steps:
            return
        job.background.wait()  # what is being written counts
        good = checkpoint.newest(job.checkpoints)
        job.run.update(status="diverged")
        raise Diverged(
            f"loss {loss} or gradient norm {grad_norm} was not finite for {job.bad_steps} steps "
            "in a row, up to step "
            f"{step + 1}; none was applied. Rows: {job.run.folder / 'bad_steps.jsonl'}; last good "
            "checkpoint: "
            f"{'none' if good is None else f'step {good.step}'}"
        )
