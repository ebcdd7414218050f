"""What a run shows: a live line on a terminal, plain lines elsewhere. It reads records and computes
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from sftx.printable import printable
from sftx.report.record import Run
from sftx.types import Ended, Ledger, StepRecord

PLAIN_EVERY = 10.0
"""Seconds between lines where the output is not a terminal."""


class Progress:
    """Prints to stderr; silent when `on` is false."""

    def __init__(self, on: bool) -> None:
        self.console = Console(stderr=True, quiet=not on, highlight=False)
        self._bar: Bar | None = None
        self._last_line = 0.0
        self._encoding_since: float | None = None
        self._smooth: float | None = None
        self._predicted = 0.0  # seconds of all steps
        self._steps_seen = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if isinstance(error, Ended):
            self.say(f"ended    {error.message}")

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def encoding(self, done: int, total: int) -> None:
        """Rows encoded so far."""
        now = time.monotonic()
        if done == 0 or self._encoding_since is None:
            self._encoding_since = now
        if now - max(self._last_line, self._encoding_since) >= PLAIN_EVERY / 5 and 0 < done < total:
            self._last_line = now
            left = (now - self._encoding_since) * (total - done) / done
            self.say(f"encoding {done:,} of {total:,} rows, about {left:,.0f} s left")

    def data(self, train: Ledger, held_out: Ledger | None, num_steps: int) -> None:
        """The ledger and the plan, before anything is loaded."""
        self.say(f"train    {train.summary()}")
        for note, count in train.notes.items():
            self.say(f"         {note}: {count:,}")
        for warning in train.warnings():
            self.say(f"warning  {warning}")
        if held_out is not None:
            self.say(f"held out {held_out.summary()}")
            for warning in held_out.warnings():
                self.say(f"warning  of the held-out rows, {warning}")
        self.say(f"plan     {num_steps:,} steps")

    def model(self, summary: str, notes: list[str], start: int) -> None:
        """The model and where it trains, after the checks."""
        self.say(f"model    {summary}")
        for note in notes:
            self.say(f"note     {note}")
        if start:
            self.say(f"resume   after step {start:,}")

    def time(self, predicted: float | None) -> None:
        """How long all steps will take, before the first one."""
        self._predicted = predicted or 0.0
        if self._predicted >= 1:
            total = _duration(self._predicted)
            self.say(
                f"time     about {total} for all steps, while nothing else runs on this machine"
            )

    def step(self, record: StepRecord) -> None:
        """One step done."""
        self._correct(record)
        if record.loss is not None:
            self._smooth = (
                record.loss if self._smooth is None else 0.9 * self._smooth + 0.1 * record.loss
            )
        shown = "not finite" if record.loss is None else f"{record.loss:.4f}"
        text = f"loss {shown}  lr {record.learning_rate:.2e}  {record.tokens_per_second:,.0f} tok/s"
        if record.seconds_left:
            text += f"  {_duration(record.seconds_left)} left"
        if self.console.is_terminal:
            self._live(record, text)
        elif time.monotonic() - self._last_line >= PLAIN_EVERY or record.step in (
            1,
            record.num_steps,
        ):
            self._last_line = time.monotonic()
            self.say(f"step     {record.step:,}/{record.num_steps:,}  {text}")
        if record.loss is None:
            self.say(
                f"warning  step {record.step:,}: loss or gradient not finite; the update was not "
                "applied"
            )
        if record.eval is not None:
            self.evaluated(record.step, record.eval)

    def _correct(self, record: StepRecord) -> None:
        """After the third step seen, say what they tell of the prediction where it was far off."""
        self._steps_seen += 1
        if self._steps_seen != 3 or not record.seconds_left or not self._predicted:
            return
        expected = self._predicted * (record.num_steps - record.step) / record.num_steps
        ratio = record.seconds_left / expected
        if record.seconds_left >= 10 and not 0.75 < ratio < 1.33:
            left = _duration(record.seconds_left)
            self.say(
                f"time     about {left} left by the first steps, {ratio:.1f} times the prediction "
                "(other work on the "
                "machine counts in it)"
            )

    def evaluated(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of an evaluation."""
        shown = {name: value for name, value in numbers.items() if name != "targets"}
        forms = {"loss": ".4f", "perplexity": ".2f"}
        found = [f"{name} {value:{forms.get(name, '.4g')}}" for name, value in shown.items()]
        if found:
            self.say(f"held out {'  '.join(found)}  after step {step:,}")

    def samples(self, lines: Sequence[Mapping[str, object]]) -> None:
        """One of the newest answers."""
        for line in lines[:1]:
            for name, key in (
                ("prompt", "prompt"),
                ("answer", "output"),
                ("expected", "reference"),
            ):
                text = " ".join(str(line[key]).split())
                self.say(f"{name:9}{text if len(text) <= 160 else text[:157] + '...'}")

    def finished(self, run: Run) -> None:
        """Where the result is."""
        if self._bar is not None:
            self._bar.stop()
        predicted, measured = run.facts.predicted, run.facts.measured
        if measured and predicted and predicted["memory"]:
            peaks = (
                f"{measured['memory'] / 2**30:.2f} GiB "
                f"({predicted['memory']['peak'] / 2**30:.2f} predicted)"
            )
            expected = round(predicted["seconds"] or 0) or "none"
            seconds = (
                f"{measured['seconds']:,.0f} s in steps ({expected} predicted for a free machine)"
            )
            self.say(f"measured peak memory {peaks}, {seconds}")
        self._judged(run.facts.eval_before or {}, run.facts.eval_after or {})
        self.say(
            f"done     {run.folder} holds the trained model; metrics.jsonl and ledger.json tell "
            "what happened"
        )

    def _judged(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """The stop test and what was forgotten, before training and of the model that is written."""
        if "ended" in after:
            was = f"{100 * before['ended']:.1f} % -> " if "ended" in before else ""
            self.say(f"stops    {was}{100 * after['ended']:.1f} % of the answers end by themselves")
        forgot: list[str] = []
        if "kl" in after:
            forgot.append(f"KL to the base {before.get('kl', 0.0):.4g} -> {after['kl']:.4g}")
        if "general loss" in after:
            was = f"{before['general loss']:.4f} -> " if "general loss" in before else ""
            forgot.append(f"loss on the general text {was}{after['general loss']:.4f}")
        if forgot:
            self.say(f"forgot   {', '.join(forgot)} (nats per token)")

    def _live(self, record: StepRecord, text: str) -> None:
        if self._bar is None:
            columns = TextColumn("step {task.completed:,}/{task.total:,}"), BarColumn()
            self._bar = Bar(*columns, TextColumn("{task.description}"), console=self.console)
            self._bar.add_task(text, total=record.num_steps)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=record.step, description=text)


def _duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3 h 20 min`."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
