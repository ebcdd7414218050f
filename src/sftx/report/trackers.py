"""Trackers (TensorBoard, Weights & Biases, MLflow, Trackio) get what a run writes into its folder.

Each has a thread that reads metrics.jsonl, samples.jsonl and run.json, so training never waits for
one, and a tracker that fails is off from then on. `sftx.report.send` hands over a run that is already there.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from sftx.boundary import boundary
from sftx.report.facts import RunFacts, read_facts
from sftx.report.record import Run
from sftx.report.tracker_clients import Card, open_client
from sftx.settings.schema import Tracker
from sftx.types import UserError

EVERY = 2.0
"""Seconds between two looks into the folder."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for its trackers."""
TRAIN_NUMBERS = (
    "loss",
    "accuracy",
    "learning_rate",
    "grad_norm",
    "epoch",
    "seconds",
    "tokens_per_second",
    "memory",
    "total_tokens",
    "total_targets",
)
"""The fields of a StepRecord that trackers get, as `train/NAME`."""

Record = Mapping[str, Any]
"""A line of metrics.jsonl or of samples.jsonl."""
Naming = Callable[[Record], dict[str, float]]
"""The numbers of a record, under the names that a tracker gets."""


def numbers_of(record: Record) -> dict[str, float]:
    """The numbers of a step as `train/NAME`, the held-out ones as `eval/NAME`."""
    numbers: dict[str, float | None] = {}
    if record["step"] > 0:
        for name in TRAIN_NUMBERS:
            numbers[f"train/{name}"] = record.get(name)
        for name, value in (record.get("routers") or {}).items():
            numbers[f"train/router_{name}"] = value
        numbers["train/targets_per_second"] = record["targets"] / max(record["seconds"], 1e-9)
    for name, value in (record["eval"] or {}).items():
        numbers["eval/" + re.sub(r"[^\w.-]", "_", name)] = value
    return {name: value for name, value in numbers.items() if value is not None}


def check_installed(track: Tracker | Sequence[Tracker]) -> None:
    """UserError for a tracker whose package is missing."""
    for name in _names(track):
        if find_spec(name) is None:
            raise UserError(f"track: {name} is not installed: pip install 'sftx[{name}]'")


def _names(track: Tracker | Sequence[Tracker]) -> list[Tracker]:
    if isinstance(track, str):
        return [track]
    return list(dict.fromkeys(track))


@contextmanager
def tracking(
    run: Run,
    track: Tracker | Sequence[Tracker],
    say: Callable[[str], None],
    card: Card | None = None,
    naming: Naming = numbers_of,
) -> Iterator[None]:
    """Hand over what `run` writes, until the end of the block.

    `say` gets a line where a tracker fails. `card` has the names of the run where they are not
    those of its folder.
    """
    names = _names(track)
    if not names or not run.writes or run.finished:
        yield
        return
    if not run.facts.tracker_id:
        run.update(tracker_id=new_id())
    over = Event()
    card = replace(card or card_of(run.folder), id=run.facts.tracker_id)
    threads: dict[str, Thread] = {}
    for name in names:
        following = _Following(name, card, naming, over, say)
        threads[name] = Thread(target=following.run, name=f"track {name}", daemon=True)
        threads[name].start()
    try:
        yield
    finally:
        over.set()
        _wait(threads, say)


def _wait(threads: Mapping[str, Thread], say: Callable[[str], None]) -> None:
    """Wait for the threads to hand over the rest; a line where that takes long."""
    until = time.monotonic() + PATIENCE
    for name, thread in threads.items():
        thread.join(1.0)
        if thread.is_alive():
            say(f"track    waiting for {name}, at most {PATIENCE:.0f} s")
        thread.join(max(until - time.monotonic(), 0.0))
        if thread.is_alive():
            say(f"warning  track: {name} has not taken the end of the run; {_later(name)}")


def card_of(folder: Path) -> Card:
    """What trackers are told of the run in a folder."""
    facts = RunFacts.of_json(read_facts(folder / "run.json"))
    told = {
        "versions": facts.versions,
        "device": facts.device,
        "precision": facts.precision,
        "parameters": facts.parameters,
        "num_steps": facts.num_steps,
        "peak_learning_rate": facts.peak_learning_rate,
    }
    settings = {**facts.config, "run": told}
    return Card(id=facts.tracker_id, folder=folder, name=folder.resolve().name, settings=settings)


def new_id() -> str:
    """What trackers will know a run by."""
    return uuid4().hex[:8]


def _later(name: str) -> str:
    return f"`sftx report RUN to={name}` sends the rest"


@dataclass
class _Following:
    """What the thread of one tracker does."""

    name: Tracker
    card: Card
    naming: Naming
    over: Event
    say: Callable[[str], None]

    def run(self) -> None:
        """Follow the run to its end. Whatever the tracker raises ends it for this run, and the run
        goes on.
        """
        try:
            with boundary(f"track: {self.name}"):
                self._follow()
        except (UserError, OSError, MemoryError, SystemExit) as error:
            place = f"track: {self.name}: "
            what = str(error).removeprefix(place)
            self.say(
                f"warning  {place}{what}; it is off from here on, training goes on; "
                f"{_later(self.name)}"
            )

    def _follow(self) -> None:
        client = open_client(self.name, self.card)
        feed = Feed(self.card, self.name)
        ended = False
        while not ended:
            ended = self.over.wait(EVERY)
            for step in feed.take(ended):
                client.add(step.number, self.naming(step.record), step.samples)
            client.flush()
            feed.mark()
        client.close(read_facts(self.card.folder / "run.json").get("status", ""))


@dataclass(frozen=True)
class Step:
    """What a run wrote about one step; 0 is the model before training."""

    number: int
    record: Record
    samples: list[Record]


class Feed:
    """The steps of a run that a tracker does not have yet."""

    def __init__(self, card: Card, tracker: str) -> None:
        self._card = card
        self._records = Tail(card.folder / "metrics.jsonl")
        self._samples = Tail(card.folder / "samples.jsonl")
        self._mark = card.folder / f".sent.{tracker}"
        self._sent = self._read_mark()

    def take(self, over: bool) -> Iterator[Step]:
        """The steps that are new, in order. The last one waits for the next, or until the run is
        `over`: its held-out numbers may be written after it.
        """
        self._samples.read()
        self._records.read()
        records = self._records.by_step
        ready = sorted(records) if over else sorted(records)[:-1]
        if self._sent < 0 and 0 not in records and (ready or over):
            yield from self._before_training()
        for number in ready:
            record = records.pop(number)[-1]
            samples = self._samples.by_step.pop(number, [])
            if number > self._sent:
                self._sent = number
                yield Step(number, record, samples)

    def mark(self) -> None:
        """Remember on disk how far the tracker has come."""
        self._mark.write_text(f"{self._card.id} {self._sent}\n", encoding="utf-8")

    def _before_training(self) -> Iterator[Step]:
        """Step 0, where it is in run.json alone."""
        numbers = read_facts(self._card.folder / "run.json").get("eval_before")
        samples = self._samples.by_step.pop(0, [])
        self._sent = 0
        if numbers or samples:
            yield Step(0, {"step": 0, "eval": numbers}, samples)

    def _read_mark(self) -> int:
        """The last step that was sent of this run; -1 if none was."""
        if self._mark.exists():
            found = re.fullmatch(rf"{self._card.id} (-?\d+)\n", self._mark.read_text("utf-8"))
            if found:
                return int(found[1])
        return -1


class Tail:
    """The lines of a growing file of JSON by their `step`; a file that was written anew is read
    anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_step: dict[int, list[Record]] = {}
        self._offset = 0
        self._before = b""  # the bytes that stood before the offset

    def read(self) -> None:
        """Add the lines that are new and whole."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset - len(self._before))
            if file.read(len(self._before)) != self._before:
                self.by_step.clear()
                self._offset = 0
                file.seek(0)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if whole:
            self._offset += len(whole)
            self._before = whole[-80:]
        for line in whole.splitlines():
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            value = json.loads(line)
        except ValueError:  # damaged: a power loss cut it
            return
        self.by_step.setdefault(value["step"], []).append(value)
