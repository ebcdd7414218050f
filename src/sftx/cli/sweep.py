"""Try combinations of settings: `sftx sweep run.yaml optim.learning_rate=1e-5,3e-5 adapter.rank=8,64`.

A setting with several values, commas between them, is swept over; every combination is a trial. A
list is one value: data.train=[a.jsonl,b.jsonl]. With trials=N a setting may be a range too,
optim.learning_rate=1e-5..1e-3, and N combinations are drawn; a range is drawn evenly in its
logarithm where the upper end is at least ten times the lower, and whole between whole numbers.

Trials run one after the other, each in a process of its own and a folder of its own in `output`, and
share the encoded data. The same command again continues: finished trials are not run again, the one
that was stopped goes on, those that failed are tried anew. A trial that fails is named, and the
others go on. The best has the lowest held-out loss, or is best by eval.keep_best.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sftx.cli._inputs import whole_number
from sftx.files import make_folder, write_json
from sftx.model_config import read_json
from sftx.printable import printable
from sftx.report.facts import read_facts
from sftx.report.progress import Progress, duration
from sftx.report.run_page import write_report
from sftx.report.trackers import Tail
from sftx.settings.load import load_config
from sftx.settings.schema import Config
from sftx.sweep import (
    Choice,
    Point,
    Range,
    Space,
    grid,
    optuna_study,
    random_points,
    run_process,
    suggested,
    values_of,
)
from sftx.training.best import lower_is_better
from sftx.types import Ended, UserError

STAGE = "train"
EXAMPLE = "sftx sweep run.yaml optim.learning_rate=1e-5,3e-5"
EXTRA = {
    "trials": "Draw so many combinations instead of trying all of them.",
    "search": "How they are drawn: random (default), or tpe, by optuna: what went well before is "
    "tried more.",
    "nproc": "Processes of each trial, as in `sftx train`.",
}
DECIDE = ("output", "data.eval", "data.eval_rows", "data.eval_split", "eval.keep_best")
"""Settings that all trials must share, or they could not be compared."""
EXIT_STOPPED = 75


@dataclass
class Trial:
    """One combination and what became of it. `state`: running, finished or failed."""

    number: int
    point: Point
    state: str = "running"
    metric: str = ""
    value: float | None = None
    seconds: float = 0.0
    why: str = ""  # it failed

    @property
    def cost(self) -> float:
        """The value, as a number of which less is better."""
        assert self.value is not None
        if lower_is_better(self.metric):
            return self.value
        return -self.value

    def __str__(self) -> str:
        return " ".join(f"{key}={text}" for key, text in self.point.items())


class Stopped(Ended):
    """The sweep was asked to stop."""

    exit_code = EXIT_STOPPED


def run(
    path: str = "",
    overrides: Sequence[str] = (),
    trials: str = "",
    search: str = "random",
    nproc: str = "",
) -> int:
    """Run the trials that are left, print a table and name the best. Returns 1 where none
    finished.
    """
    if search not in ("random", "tpe"):
        raise UserError(f"sftx sweep: search={printable(search)}; allowed: random, tpe")
    space, fixed = _space(overrides)
    count = whole_number("sweep: trials", trials) if trials else None
    sweep = Sweep(path, fixed, space, nproc)
    points = sweep.points(count, search)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with Progress(True) as progress:
            for point in points:
                sweep.try_point(point, progress)
                sweep.write()
    finally:
        signal.signal(signal.SIGTERM, before)
    return sweep.conclude()


def _stop(number: int, _: object) -> None:
    raise Stopped(f"stopped by signal {number}; run the same command to continue")


def _space(overrides: Sequence[str]) -> tuple[dict[str, Choice | Range], list[str]]:
    """What is swept over, and the settings that have one value."""
    space: dict[str, Choice | Range] = {}
    fixed: list[str] = []
    for override in overrides:
        key, _, text = override.partition("=")
        values = values_of(key, text)
        if values is None:
            fixed.append(override)
        elif key in DECIDE:
            raise UserError(f"sftx sweep: {key}: all trials must share it, to be compared")
        elif key in space:
            raise UserError(f"sftx sweep: {key}: given twice")
        else:
            space[key] = values
    if not space:
        raise UserError(
            "sftx sweep: nothing to sweep over; give a setting several values, such as "
            "optim.learning_rate=1e-5,3e-5"
        )
    return space, fixed


class Sweep:
    """The trials of one command, and sweep.json, which remembers them."""

    def __init__(self, path: str, fixed: list[str], space: Space, nproc: str) -> None:
        self.path = path
        self.fixed = fixed
        self.space = space
        self.nproc = nproc
        self.total: int | None = None
        first = next(random_points(space, 0))
        config = self._first_that_loads(first)
        self.folder = Path(config.output)
        self.seed = config.seed
        if not (config.data.eval or config.data.eval_rows or config.data.eval_split):
            raise UserError(
                "sftx sweep: held-out rows are needed to name the best: set data.eval or "
                "data.eval_split"
            )
        self.base = _shared(config, space)
        self.trials = self._earlier()

    def config(self, point: Point) -> Config:
        """The settings of a trial; UserError where they are wrong."""
        given = [f"{key}={text}" for key, text in point.items()]
        return load_config(self.path or None, [*self.fixed, *given])

    def _first_that_loads(self, first: Point) -> Config:
        """Settings of a combination that can be used; UserError where it seems that none can."""
        try:
            return self.config(first)
        except UserError as error:
            for point in islice(random_points(self.space, 1), 50):
                try:
                    return self.config(point)
                except UserError:
                    continue
            raise error from None

    def _earlier(self) -> list[Trial]:
        """The trials of an earlier call; UserError where the folder holds something else."""
        file = self.folder / "sweep.json"
        if not file.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise UserError(f"output: {self.folder} holds something else than a sweep")
            return []
        told = read_json(file)
        different = [key for key, value in self.base.items() if told["base"].get(key) != value]
        if different:
            raise UserError(
                f"output: {self.folder} holds a sweep with another {different[0]}; choose another "
                "folder"
            )
        return [Trial(**trial) for trial in told["trials"]]

    def points(self, count: int | None, search: str) -> Iterator[Point]:
        """The combinations to try, in order."""
        ranges = any(isinstance(values, Range) for values in self.space.values())
        if count is None or (not ranges and len(grid(self.space)) <= count):
            found = grid(self.space)
            self.total = len(found)
            return iter(found)
        self.total = count
        if search == "tpe":
            return self._asked_of_optuna(count)
        drawn = random_points(self.space, self.seed)
        return (point for point, _ in zip(drawn, range(count), strict=False))

    def _asked_of_optuna(self, count: int) -> Iterator[Point]:
        """Points as TPE asks for them; it is told what became of each."""
        study = optuna_study("tpe", self.seed, lower_is_better=True)
        for _ in range(count):
            asked = study.ask()
            point = suggested(self.space, asked)
            yield point
            trial = self.trial_of(point)
            if trial.value is None:
                from optuna.trial import TrialState

                study.tell(asked, state=TrialState.FAIL)
            else:
                study.tell(asked, trial.cost)

    def trial_of(self, point: Point) -> Trial:
        """The trial of a point, a new one where there is none yet."""
        for trial in self.trials:
            if trial.point == point:
                return trial
        self.trials.append(Trial(len(self.trials) + 1, point))
        return self.trials[-1]

    def folder_of(self, trial: Trial) -> Path:
        """The output folder of a trial."""
        return self.folder / f"trial-{trial.number}"

    def try_point(self, point: Point, progress: Progress) -> None:
        """Run the trial of a point, unless it is finished."""
        trial = self.trial_of(point)
        progress.say(f"trial    {trial.number} of {self.total}: {trial}")
        if trial.state == "finished":
            progress.say(f"         finished already: {trial.metric} {trial.value:.4f}")
            return
        began = time.monotonic()
        trial.state = "running"
        trial.why = ""
        self.write_record()
        try:
            self.config(point)
            self._run(trial, progress)
        except UserError as error:
            trial.state = "failed"
            trial.why = str(error)
        trial.seconds += time.monotonic() - began
        if trial.state == "failed":
            progress.say(f"         failed: {trial.why}")
        else:
            took = duration(trial.seconds)
            progress.say(f"         {trial.metric} {trial.value:.4f}, {took}")

    def _run(self, trial: Trial, progress: Progress) -> None:
        """Train in a process of its own, and read what came out; UserError where it failed."""
        folder = self.folder_of(trial)
        log = folder.with_suffix(".log")
        progress.phase("starting the trial")
        code = run_process(self._command(trial), log, _watching(folder, progress))
        facts = read_facts(folder / "run.json")
        if code or facts.get("status") != "finished":
            raise UserError(f"{_last_words(log)} (exit code {code}; {log})")
        best = facts.get("best")
        after = facts.get("eval_after") or {}
        trial.metric = best["metric"] if best else "loss"
        value = float(best["value"] if best else after["loss"])
        if not math.isfinite(value):
            raise UserError(f"{trial.metric} is {value}")
        trial.value = value
        trial.state = "finished"

    def _command(self, trial: Trial) -> list[str]:
        """The command that trains a trial."""
        command = [sys.executable, "-m", "sftx", "train"]
        command += [self.path] if self.path else []
        command += [given for given in self.fixed if not given.startswith("output=")]
        command += [f"{key}={text}" for key, text in trial.point.items()]
        command += [f"output={json.dumps(str(self.folder_of(trial)))}"]
        return command + ([f"nproc={self.nproc}"] if self.nproc else [])

    def finished(self) -> list[Trial]:
        """The trials that finished, the best first."""
        return sorted((t for t in self.trials if t.state == "finished"), key=lambda t: t.cost)

    def write_record(self) -> None:
        """Write sweep.json."""
        make_folder(self.folder)
        told = {"base": self.base, "trials": [asdict(trial) for trial in self.trials]}
        write_json(self.folder / "sweep.json", told)

    def write(self) -> None:
        """Write sweep.json, and report.html over all trials that finished."""
        self.write_record()
        folders = [self.folder_of(trial) for trial in self.finished()]
        if folders:
            write_report(folders, self.folder / "report.html")

    def conclude(self) -> int:
        """Print the table and the best; 1 where no trial finished."""
        console = Console(highlight=False)
        ranked = self.finished()
        failed = [trial for trial in self.trials if trial.state != "finished"]
        table = Table(box=None, pad_edge=False)
        for name in ("trial", *self.space, ranked[0].metric if ranked else "loss", "time"):
            table.add_column(printable(name), overflow="fold")
        for trial in [*ranked, *failed]:
            value = "failed" if trial.value is None else f"{trial.value:.4f}"
            texts = [printable(trial.point.get(key, "")) for key in self.space]
            table.add_row(str(trial.number), *texts, value, duration(trial.seconds))
        console.print(table)
        if not ranked:
            print(f"no trial finished; {self.folder} has their output", file=sys.stderr)
            return 1
        best = ranked[0]
        said = f"best     trial {best.number}: {best}, {best.metric} {best.value:.4f}, in "
        console.print(printable(said + str(self.folder_of(best))), markup=False, soft_wrap=True)
        return 0


def _shared(config: Config, space: Space) -> dict[str, Any]:
    """The settings that all trials share, by dotted name; those of the machine left out."""
    values = config.model_dump(mode="json", exclude={"runtime", "track", "checkpoint", "output"})
    flat: dict[str, Any] = {}
    for section, settings in values.items():
        inner = settings if isinstance(settings, dict) else {"": settings}
        flat |= {f"{section}.{name}".rstrip("."): value for name, value in inner.items()}
    return {key: value for key, value in flat.items() if key not in space}


def _watching(folder: Path, progress: Progress) -> Callable[[], bool]:
    """A function that shows how far the run in `folder` is."""
    tail = Tail(folder / "metrics.jsonl")
    begins = True

    def watch() -> bool:
        nonlocal begins
        tail.read()
        if tail.by_step:
            record = tail.by_step[max(tail.by_step)][-1]
            progress.phase("training|steps", 0 if begins else record["step"], record["num_steps"])
            begins = False
            tail.by_step.clear()
        return False

    return watch


def _last_words(log: Path) -> str:
    """What the output of a trial ends with: its error, or its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith(("error: ", "ended "))]
    told = said or [line for line in lines if line.strip()] or ["it said nothing"]
    return printable(told[-1].removeprefix("error: ").removeprefix("ended").strip())
