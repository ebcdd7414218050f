"""What a run shows: live lines on a terminal, plain lines elsewhere. It reads records and computes
nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, RLock, Thread
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sftx.printable import printable
from sftx.report.record import Run
from sftx.types import Ended, Ledger, StepRecord

LONG = 2.0
"""Seconds after which a job is named, so that nothing is silent for longer."""
PLAIN_EVERY = 10.0
"""Seconds between lines where the output is not a terminal; a sixtieth of the time so far where
that is more.
"""
SLOWEST = 60.0
"""The most seconds between them."""
REFRESH = 0.5
"""Seconds between two looks at how things are."""
DRAW_EVERY = 1.0
"""Seconds between two drawings of the steps; one takes a processor about 2 ms."""
INDENT = 9
"""Cells of the word that a line begins with."""


@dataclass(frozen=True)
class Phase:
    """What is being done, since when, and how much of it is done; `total` 0 = nobody knows."""

    name: str
    since: float
    done: int = 0
    total: int = 0

    def text(self) -> str:
        """`encoding 2,000 of 9,000 rows, about 12 s left`."""
        took = time.monotonic() - self.since
        name, _, unit = self.name.partition("|")
        if not self.total or not self.done:
            return f"{name}, {duration(took)} so far"
        left = took * (self.total - self.done) / self.done
        return f"{name} {self.done:,} of {self.total:,} {unit}, about {duration(left)} left"


def can_redraw() -> bool:
    """Whether lines can be drawn anew: stderr is a terminal, and not the output of a notebook, which
    asks for colours (FORCE_COLOR) and would keep every drawing.
    """
    return sys.stderr.isatty() and "JPY_PARENT_PID" not in os.environ


class Progress:
    """Prints to stderr; silent when `on` is false. Inside `with`, what takes long is shown."""

    def __init__(self, on: bool) -> None:
        self.console = Console(
            stderr=True, quiet=not on, highlight=False, force_terminal=can_redraw()
        )
        self.limit = 0  # bytes that this process may take
        self._phase: Phase | None = None
        self._record: StepRecord | None = None
        self._held_out: float | None = None
        self._began = self._last_line = time.monotonic()
        self._live: Live | None = None  # while it has something to show
        self._lock = RLock()
        self._over = Event()
        self._predicted = 0.0  # seconds of all steps
        self._steps_seen = 0

    def __enter__(self) -> Progress:
        if not self.console.quiet:
            Thread(target=self._tick, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._over.set()
        self._phase = self._record = None
        self._refresh()
        if isinstance(error, Ended):
            self.say(f"ended    {error.message}")

    def say(self, text: str) -> None:
        """One line; on a terminal, as many as its width asks for."""
        text = printable(text)
        if self.console.is_terminal:
            text = _folded(text, self.console)
        with self._lock:
            if self._live is not None:
                self._refresh()
            self.console.print(text, markup=False, soft_wrap=True)

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """What is being done from here on, until the next phase or step; named if it takes long.

        `done` of `total` tells how long it will take. A unit may follow the name: `encoding|rows`.
        """
        since = time.monotonic()
        if done and self._phase is not None:  # what is done was done since then
            since = self._phase.since
        self._phase = Phase(name, since, done, total)

    def encoding(self, done: int, total: int) -> None:
        """Rows encoded so far."""
        self.phase("encoding|rows", done, total)

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

    def model(self, summary: str, notes: list[str], start: int, limit: int = 0) -> None:
        """The model and where it trains, after the checks; `limit`: bytes that it may take."""
        self.limit = limit
        self._phase = None
        self.say(f"model    {summary}")
        for note in notes:
            self.say(f"note     {note}")
        if start:
            self.say(f"resume   after step {start:,}")

    def time(self, predicted: float | None) -> None:
        """How long all steps will take, before the first one."""
        self._predicted = predicted or 0.0
        if self._predicted >= 1:
            total = duration(self._predicted)
            self.say(
                f"time     about {total} for all steps, while nothing else runs on this machine"
            )

    def step(self, record: StepRecord) -> None:
        """One step done."""
        self._phase = None
        self._record = record
        self._correct(record)
        now = time.monotonic()
        pace = min(max(PLAIN_EVERY, (now - self._began) / 60), SLOWEST)
        is_plain = not self.console.is_terminal
        is_due = is_plain and (record.step == 1 or now - self._last_line >= pace)
        is_last = record.step == record.num_steps
        if is_last:
            self._record = None
        if is_due or is_last:
            self._last_line = now
            parts = [*self._numbers(record), *self._speed(record), *_left(record)]
            said = "  ".join(parts)
            self.say(f"step     {record.step:,}/{record.num_steps:,}  {said}")
        if record.loss is None:
            self.say(
                f"warning  step {record.step:,}: loss or gradient not finite; the update was not "
                "applied"
            )
        if record.eval is not None:
            self.evaluated(record.step, record.eval)

    def evaluated(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of an evaluation."""
        self._phase = None
        self._held_out = numbers.get("loss", self._held_out)
        shown = {name: value for name, value in numbers.items() if name != "targets"}
        found = [f"{name} {_number(name, value)}" for name, value in shown.items()]
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
        self._phase = self._record = None
        predicted = run.facts.predicted
        measured = run.facts.measured
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

    def _correct(self, record: StepRecord) -> None:
        """After the third step seen, say what they tell of the prediction where it was far off."""
        self._steps_seen += 1
        if self._steps_seen != 3 or not record.seconds_left or not self._predicted:
            return
        expected = self._predicted * (record.num_steps - record.step) / record.num_steps
        ratio = record.seconds_left / expected
        if record.seconds_left >= 10 and not 0.75 < ratio < 1.33:
            left = duration(record.seconds_left)
            self.say(
                f"time     about {left} left by the first steps, {ratio:.1f} times the prediction "
                "(other work on the "
                "machine counts in it)"
            )

    def _numbers(self, record: StepRecord) -> Iterator[str]:
        yield "loss not finite" if record.loss is None else f"loss {record.loss:.4f}"
        if self._held_out is not None:
            yield f"held out {self._held_out:.4f}"
        yield f"lr {record.learning_rate:.2e}"
        if record.grad_norm is not None:
            yield f"grad {record.grad_norm:.2f}"

    def _speed(self, record: StepRecord) -> Iterator[str]:
        yield f"{record.tokens_per_second:,.0f} tok/s"
        yield f"{record.targets / max(record.seconds, 1e-9):,.0f} targets/s"
        limit = f" of {self.limit / 2**30:.1f}" if self.limit else ""
        yield f"{record.memory / 2**30:.1f}{limit} GiB"

    def _tick(self) -> None:
        """Show, now and then, how things are."""
        drawn = 0.0
        while not self._over.wait(REFRESH):
            now = time.monotonic()
            if not self.console.is_terminal:
                self._name_long_phase()
            elif self._phase is not None or now - drawn >= DRAW_EVERY:
                drawn = now
                self._refresh()

    def _refresh(self) -> None:
        """Draw the live lines anew; without any there is no live display, and no empty line."""
        with self._lock:
            lines = self._lines()
            if lines and self._live is None and not self._over.is_set():
                redirect = sys.stdout.isatty()  # what is piped elsewhere stays there
                self._live = Live(
                    console=self.console,
                    auto_refresh=False,
                    transient=True,
                    redirect_stdout=redirect,
                )
                self._live.start()
            if self._live is None:
                return
            if lines:
                self._live.update(Group(*lines), refresh=True)
            else:
                self._live.stop()
                self._live = None

    def _lines(self) -> list[Table | Text]:
        """How far the steps are, their numbers, and a job that takes long."""
        lines: list[Table | Text] = []
        record = self._record
        phase = self._phase
        if record is not None:
            bar = ProgressBar(record.num_steps, record.step, width=30)
            row = Table.grid(padding=(0, 2))
            counted = f"step     {record.step:,}/{record.num_steps:,}"
            row.add_row(counted, bar, *_left(record))
            lines.append(row)
            for numbers in (self._numbers(record), self._speed(record)):
                lines.append(_one_line(" " * INDENT + "  ".join(numbers)))
        if phase is not None and time.monotonic() - phase.since >= LONG:
            lines.append(_one_line(phase.text()))
        return lines

    def _name_long_phase(self) -> None:
        """Where there is no terminal: a line for a job that takes long, and more if it goes on."""
        phase = self._phase
        now = time.monotonic()
        if phase is None or now - phase.since < LONG:
            return
        is_first = self._last_line < phase.since + LONG
        if is_first or now - self._last_line >= PLAIN_EVERY:
            self._last_line = now
            self.say(phase.text())


@contextmanager
def working(what: str, on: bool = True) -> Iterator[Progress]:
    """Show `what` if the block takes long."""
    with Progress(on) as progress:
        progress.phase(what)
        yield progress


def _left(record: StepRecord) -> list[str]:
    return [f"{duration(record.seconds_left)} left"] if record.seconds_left else []


def _number(name: str, value: float) -> str:
    """A number of an evaluation, in the form that its kind has."""
    if name == "ended" or name.split(" of ")[0] == "accuracy":
        return f"{100 * value:.1f} %"
    forms = {"loss": ".4f", "perplexity": ".2f"}
    return f"{value:{forms.get(name, '.4g')}}"


def _one_line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _folded(text: str, console: Console) -> str:
    """`text` in lines that fit the terminal, those after the first indented."""
    head = text[:INDENT]
    body = text[INDENT:]
    if "\n" in text or len(head) < INDENT:
        return text
    lines = Text(body).wrap(console, max(console.width - INDENT, 20))
    return head + ("\n" + " " * INDENT).join(line.plain.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3 h 20 min`."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
