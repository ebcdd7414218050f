"""From the outcome of a step, still on the device, to its record; and the end of a run whose
numbers are not finite.
"""

from __future__ import annotations

import time

from sftx.data.plan import Plan
from sftx.training import checkpoint
from sftx.training.job import Job
from sftx.training.signals import Diverged
from sftx.training.step import StepResult
from sftx.types import StepRecord

MEMORY = 0.95
"""How much of what earlier steps took stays with every new one: about the last twenty count, as
other work on the machine comes and goes.
"""


class Eta:
    """Seconds left, corrected by each step: the work that is left, at the speed of the latest
    steps.

    Work is what `plan.work` says of each example, so that a long step that took long is no sign of
    a slow machine; what is left is counted by an average example. Evaluations and checkpoints are
    not in it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._seconds = self._work = 0.0
        self._taken = 0

    def after(self, step: int, seconds: float) -> float | None:
        """Seconds left after `step` (0-based), which took so many; None after the first, which
        warms up too.
        """
        plan = self.plan
        self._taken += 1
        if self._taken <= 2:  # what was learned from the first is forgotten with the second
            self._seconds = self._work = 0.0
        self._seconds = MEMORY * self._seconds + seconds
        work = plan.work[plan.examples(step)].sum()
        self._work = MEMORY * self._work + float(work)
        if step + 1 == plan.num_steps:
            return 0.0
        if self._taken == 1:
            return None
        epochs_left = plan.epoch(plan.num_steps - 1) - plan.epoch(step)
        return epochs_left * float(plan.work.sum()) * self._seconds / max(self._work, 1e-9)


class StepMetrics:
    """Reads steps in their order, and counts time, tokens and bad steps in `job.state`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.eta = Eta(job.plan)
        job.machine.forget_peak()
        self.restart()

    def restart(self) -> None:
        """The next step begins now: what happened since the last one is not its time."""
        self.clock = time.perf_counter()

    def read(self, step: int, packs: int, result: StepResult, launched: float | None) -> StepRecord:
        """The record of `step` (0-based), which had so many `packs`; waits for the device if it is
        not done.

        `launched` is when its last kernel was launched, for a step that is read while the next one
        computes; None where the step is read at once. Raises Diverged when too many steps in a row
        were not finite.
        """
        job = self.job
        plan = self.job.plan
        state = self.job.state
        loss, accuracy, grad_norm, bad = result.read()
        now = time.perf_counter() if launched is None else launched
        seconds = now - self.clock
        self.clock = now
        memory = job.peak_memory = job.machine.memory()
        chosen = plan.examples(step)
        tokens = int(job.corpus.lengths[chosen].sum())
        targets = int(job.corpus.targets[chosen].sum())
        state.step = step + 1
        state.seconds += seconds
        state.total_tokens += tokens
        state.total_targets += targets
        state.bad_steps = state.bad_steps + 1 if bad else 0
        if bad:
            rows = [job.corpus.place(int(i)) for i in chosen]
            job.run.bad_step(step + 1, loss, grad_norm, rows)
            self._stop_if_lost(loss, grad_norm)
        return StepRecord(
            step=step + 1,
            num_steps=plan.num_steps,
            epoch=plan.epoch(step),
            loss=None if bad else loss,
            learning_rate=job.learning_rate(step),
            grad_norm=None if bad else grad_norm,
            examples=len(chosen),
            tokens=tokens,
            targets=targets,
            weight=plan.total_weight(step),
            packs=packs,
            seconds=seconds,
            tokens_per_second=tokens / max(seconds, 1e-9),
            memory=memory,
            total_tokens=state.total_tokens,
            total_targets=state.total_targets,
            seconds_left=self.eta.after(step, seconds),
            accuracy=None if bad else accuracy,
            routers=None if bad else result.routers(),
        )

    def _stop_if_lost(self, loss: float, grad_norm: float) -> None:
        job = self.job
        state = self.job.state
        if state.bad_steps <= job.config.optim.max_bad_steps:
            return
        job.writer.wait()  # what is being written counts
        good = checkpoint.newest(job.checkpoints)
        job.run.update(status="diverged")
        raise Diverged(
            f"loss {loss} or gradient norm {grad_norm} was not finite for {state.bad_steps} steps "
            f"in a row, up to step {state.step}; none was applied. "
            f"Rows: {job.run.folder / 'bad_steps.jsonl'}; "
            f"last good checkpoint: {'none' if good is None else f'step {good.step}'}"
        )
