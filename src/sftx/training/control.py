"""Control between two steps: what the caller of `sftx.steps` may look at and ask for."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from sftx import distributed
from sftx.report.record import Run
from sftx.settings.schema import Config
from sftx.training.job import Job
from sftx.training.result import Result
from sftx.types import StepRecord, UserError


@dataclass
class Control:
    """What the loop and `Steps` tell each other.

    `exact`: the record of a step is read before the next one is launched, so that the model is as
    the record says.
    """

    exact: bool
    job: Job | None = None  # once the run is prepared, until its end
    end_asked: bool = False

    def must_end(self) -> bool:
        """Whether the caller asked for the end, on any rank; every rank must ask equally often."""
        return self.exact and bool(distributed.all_reduce_max(int(self.end_asked)))


class Steps(Iterator[StepRecord]):
    """The steps of a run: iterate over it to train, one `StepRecord` for each optimiser step.

    Between two steps nothing is under way: `model` has taken exactly the steps up to the last
    record, and `evaluate`, `save` and `stop` are about that state. The run begins with the first
    record, or when one of them is first used. It ends with its last step, and then holds the
    trained model as `result`; a loop that is left early (`break`, an error) saves nothing more.
    Several processes must make the same calls.
    """

    def __init__(
        self, config: Config, control: Control, records: Generator[StepRecord | None]
    ) -> None:
        self.config = config
        self._control = control
        self._records = records
        self._began = time.perf_counter()
        self._started = self._over = False
        self._shared = False  # the caller has the model
        self._loss: float | None = None  # of the last step, as is the next
        self._accuracy: float | None = None

    def __next__(self) -> StepRecord:
        self._start()
        self._take_back()
        try:
            record = next(self._records)
        except StopIteration:
            self._over = True
            raise
        assert record is not None
        self._loss = record.loss
        self._accuracy = record.accuracy
        self._hand_over()
        return record

    @property
    def step(self) -> int:
        """Optimiser steps that the model has taken."""
        self._start()
        return self._state.step

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self._job().plan.num_steps

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The model as it is now, on its device, ready to generate; with an adapter, peft's model.

        From the first time it is asked for, it is in evaluation mode whenever the caller has
        control. In several processes, UserError: none of them holds the whole model.
        """
        job = self._job()
        if distributed.is_joined():
            raise UserError(
                "steps.model: several processes share the model; save() it and read the checkpoint"
            )
        self._shared = True
        self._hand_over()
        return job.trained

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer that is saved with the model."""
        return self._job().tokenizer

    def evaluate(self) -> dict[str, float]:
        """Held-out `loss` and `perplexity` of the model as it is now, and what its answers score;
        metrics.jsonl holds them beside the step.

        Raises UserError where the run has no held-out rows.
        """
        if not self._job().evaluates:
            raise UserError(
                "steps.evaluate(): there are no held-out rows; set data.eval, data.eval_rows or "
                "eval_split"
            )
        with self._training() as job:
            numbers = job.evaluate()
            if numbers:  # else a signal cut it short
                job.run.write_evaluation(job.state.step, job.plan.num_steps, numbers)
            return numbers

    def save(self) -> Path:
        """Write a checkpoint of this step, from which the same run continues; returns its folder."""
        with self._training() as job:
            return job.save(in_background=True)

    def stop(self) -> None:
        """Take no further step: the next one asked for ends the run as the last step would,
        evaluated and written.

        To leave without that, and continue another time: `save()`, then `break`.
        """
        self._job()
        self._control.end_asked = True

    def close(self) -> None:
        """End the run here and now, without saving anything more, as leaving the loop does."""
        self._records.close()
        self._control.job = None
        self._over = True

    @property
    def result(self) -> Result:
        """The finished run; UserError before its end."""
        facts = Run(self.config).facts
        if not self._over or facts.status != "finished":
            raise UserError("steps.result: the run has not come to its end")
        return Result(
            config=self.config,
            folder=Path(self.config.output),
            steps=facts.num_steps if facts.ended_at is None else facts.ended_at,
            seconds=time.perf_counter() - self._began,
            loss=self._loss,
            accuracy=self._accuracy,
            eval_before=facts.eval_before,
            eval_after=facts.eval_after,
            best=facts.best,
            stopped_early=facts.stopped_early,
        )

    def _start(self) -> None:
        """Prepare the run, up to its first step."""
        if self._started:
            return
        self._started = True
        ready = next(self._records)
        assert ready is None
        assert self._control.job is not None
        self._state = self._control.job.state

    def _job(self) -> Job:
        self._start()
        if self._control.job is None:
            raise UserError("the run is over: its model is in `steps.result.model`")
        return self._control.job

    @contextmanager
    def _training(self) -> Generator[Job]:
        """Inside, the model is in the state in which it trains."""
        job = self._job()
        self._take_back()
        try:
            yield job
        finally:
            self._hand_over()

    def _hand_over(self) -> None:
        """Where the caller has the model: make it one that answers."""
        if self._control.job is not None and self._shared:
            self._control.job.hand_over()

    def _take_back(self) -> None:
        """Make it one that trains again."""
        if self._control.job is not None and self._shared:
            self._control.job.take_back()
