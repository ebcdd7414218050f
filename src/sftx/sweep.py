"""What a sweep tries: values of settings as they are written on the command line, the points that
follow from them, and one process for each trial.

A trial is a process of its own: its memory is free again at its end, and a trial that is killed or
runs out of memory ends nothing but itself.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftx.types import UserError

if TYPE_CHECKING:
    from optuna import Study, Trial

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_QUOTES = "'\""
_CLOSING = {"[": "]", "{": "}", "'": "'", '"': '"'}

Point = dict[str, str]
"""A combination: the text of each setting that is swept over."""


@dataclass(frozen=True)
class Choice:
    """Some values."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """All numbers between two. They are drawn evenly or, where the upper end is at least ten times
    the lower, evenly in their logarithm. Between whole numbers they are whole.
    """

    low: float
    high: float
    whole: bool

    @property
    def log(self) -> bool:
        """Whether numbers are drawn evenly in their logarithm."""
        return self.low > 0 and self.high >= 10 * self.low

    def text(self, value: float) -> str:
        """A number of this range, as it is written on the command line."""
        return str(round(value)) if self.whole else f"{value:.4g}"


Space = Mapping[str, Choice | Range]
"""What is swept over, by the dotted name of the setting."""


def pieces(text: str) -> list[str]:
    """`text` cut at its commas, but for those inside brackets and quotes."""
    found = [""]
    waiting = list[str]()
    for sign in text:
        if sign == "," and not waiting:
            found.append("")
            continue
        found[-1] += sign
        if waiting and sign == waiting[-1]:
            waiting.pop()
        elif sign in _CLOSING and (not waiting or waiting[-1] not in _QUOTES):
            waiting.append(_CLOSING[sign])
    return [piece.strip() for piece in found]


def values_of(key: str, text: str) -> Choice | Range | None:
    """What is swept over where a setting is written `key=text`; None for one value."""
    if found := _RANGE.fullmatch(text.strip()):
        low = float(found[1])
        high = float(found[2])
        if low >= high:
            raise UserError(f"sftx sweep: {key}={text}: the range has nothing in it")
        whole = found[1].lstrip("+-").isdigit() and found[2].lstrip("+-").isdigit()
        return Range(low, high, whole)
    values = pieces(text)
    if len(values) == 1:
        return None
    if "" in values or len(set(values)) < len(values):
        raise UserError(f"sftx sweep: {key}={text}: a value is empty, or given twice")
    return Choice(tuple(values))


def grid(space: Space) -> list[Point]:
    """Every combination; the last setting changes fastest."""
    choices: list[tuple[str, ...]] = []
    for key, values in space.items():
        if isinstance(values, Range):
            raise UserError(f"sftx sweep: {key}: a range has no end of values; say trials=N")
        choices.append(values.values)
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*choices)]


def random_points(space: Space, seed: int) -> Iterator[Point]:
    """Points drawn at random, none of them twice; ends where there seem to be no more."""
    rng = random.Random(seed)
    seen: set[tuple[str, ...]] = set()
    misses = 0
    while misses < 1000:
        point = {key: _draw(values, rng) for key, values in space.items()}
        misses += 1
        if tuple(point.values()) not in seen:
            seen.add(tuple(point.values()))
            misses = 0
            yield point


def _draw(values: Choice | Range, rng: random.Random) -> str:
    if isinstance(values, Choice):
        return rng.choice(values.values)
    if values.log:
        return values.text(values.low * (values.high / values.low) ** rng.random())
    if values.whole:
        return str(rng.randint(int(values.low), int(values.high)))
    return values.text(rng.uniform(values.low, values.high))


def optuna_study(sampler: str, seed: int, lower_is_better: bool, pruner: str = "none") -> Study:
    """A study of optuna with the sampler `random` or `tpe`, and the pruner `none` or `hyperband`.

    Raises UserError where optuna is missing.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("a sweep needs optuna: pip install 'sftx[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    pruners = {"none": optuna.pruners.NopPruner, "hyperband": optuna.pruners.HyperbandPruner}
    return optuna.create_study(
        direction="minimize" if lower_is_better else "maximize",
        sampler=samplers[sampler](seed=seed),
        pruner=pruners[pruner](),
    )


def suggested(space: Space, trial: Trial) -> Point:
    """The point that a trial of optuna asks for."""
    point: Point = {}
    for key, values in space.items():
        if isinstance(values, Choice):
            point[key] = trial.suggest_categorical(key, values.values)
        elif values.whole:
            low = int(values.low)
            high = int(values.high)
            point[key] = str(trial.suggest_int(key, low, high, log=values.log))
        else:
            drawn = trial.suggest_float(key, values.low, values.high, log=values.log)
            point[key] = values.text(drawn)
    return point


def run_process(
    command: Sequence[str], log: Path, watch: Callable[[], bool] = lambda: False
) -> int | None:
    """Run a trial with its output in `log`; returns its exit code, None where `watch` ended it.

    `watch` is called twice a second, and once more after the end; where it says so, the process is
    ended. Whatever ends this process ends the trial too, which then saves what it can.
    """
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "100"}
        )
    try:
        while process.poll() is None:
            time.sleep(0.5)
            if watch():
                return None
        watch()
    except KeyboardInterrupt:  # Ctrl-C reached the trial as well
        process.wait()
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return process.returncode
