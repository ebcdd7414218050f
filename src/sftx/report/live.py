"""The page of a run while it trains: written at evaluations and at the end, however the run ends.

Nothing here stops a run. What a page costs is known from the last one; the next is written only
once a hundred times that has passed, so that all of them take at most one hundredth of the run.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from sftx import distributed
from sftx.files import write_json
from sftx.report.histograms import LOOKED_AT, lengths_of, weights_of
from sftx.report.progress import Progress
from sftx.report.run_data import NOTED, spikes
from sftx.report.run_page import NAME, write_report
from sftx.training.job import Job
from sftx.types import StepRecord, UserError

SHARE = 0.01
"""Of the time of a run, what its pages may take; that of the end is always written."""
ROWS = 32
LETTERS = 200
"""Rows of a step that are kept, and characters of each."""


@contextmanager
def live_report(job: Job, progress: Progress) -> Generator[LiveReport]:
    """Keeps the page of a run; writes it for the last time at the end, also where the run is
    stopped or fails.
    """
    report = LiveReport(job, progress)
    try:
        yield report
    finally:
        if report.started or report.is_behind():
            report.write()


class LiveReport:
    """The page of the run of `job`."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job = job
        self.progress = progress
        self.on = job.config.runtime.report and distributed.is_main()
        self.started = False
        self._failed = False
        self._next = 0.0
        self._noted: dict[str, object] = {}
        self._rows: dict[int, dict[str, object]] = {}

    def after(self, record: StepRecord) -> None:
        """Write the page where the model was evaluated, or took its first step."""
        due = record.eval is not None or not self.started
        self.started = True
        if due and time.monotonic() >= self._next:
            self.write()

    def is_behind(self) -> bool:
        """Whether a run that finished was cut off before its page was written."""
        folder = self.job.run.folder
        page = folder / NAME
        facts = folder / "run.json"
        if not self.job.run.finished or not self.on:
            return False
        cut_off = any((folder / f"{name}.tmp").exists() for name in (NAME, NOTED))
        return cut_off or not page.exists() or page.stat().st_mtime < facts.stat().st_mtime

    def write(self) -> None:
        """Write report.json and the page; where that fails, say so once."""
        if not self.on:
            return
        begin = time.monotonic()
        folder = self.job.run.folder
        try:
            write_json(folder / NOTED, self._note())
            write_report([folder], folder / NAME)
        except (OSError, UserError) as error:
            if not self._failed:
                self.progress.say(f"warning  the report of the run is not written: {error}")
            self._failed = True
        end = time.monotonic()
        self._next = end + (end - begin) / SHARE

    def _note(self) -> dict[str, object]:
        """What the page needs of the data, which the run folder does not hold otherwise."""
        job = self.job
        if not self._noted:
            self._noted = {
                "lengths": lengths_of(job.corpus),
                "weights": weights_of(job.corpus),
                "weights_of": min(LOOKED_AT, len(job.corpus)),
            }
        steps = [line for line in job.run.metrics() if line["step"]]
        found = [spike.step for spike in spikes(job.run.folder, steps)]
        self._rows = {step: self._rows.get(step) or self._rows_of(step) for step in found}
        by_step = {str(step): rows for step, rows in self._rows.items()}
        return self._noted | {"rows": by_step}

    def _rows_of(self, step: int) -> dict[str, object]:
        """The rows of `step` (counted from 1), the first of them in its order."""
        corpus = self.job.corpus
        tokenizer = self.job.encoder.tokenizer
        chosen = self.job.plan.examples(step - 1)
        rows: list[dict[str, object]] = []
        for index in chosen[:ROWS].tolist():
            example = corpus.example(index)
            row = {
                "place": corpus.place(index),
                "tokens": len(example.ids),
                "targets": example.targets,
                "weight": round(float(corpus.weights[index]), 6),
                "text": tokenizer.decode(example.ids[:LETTERS].tolist())[:LETTERS],
            }
            rows.append(row)
        return {"of": len(chosen), "rows": rows}
