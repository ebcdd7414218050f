"""What the page of a run shows, read from the run's folder.

A run of any length makes a page of about the same size: a long series is cut into `BUCKETS` equal
spans of steps, of each of which the page gets the lowest, the highest and the mean value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sftx.evenly import evenly
from sftx.report.facts import RunFacts, read_facts
from sftx.report.record import read_lines
from sftx.settings.flat import flat
from sftx.types import Float64, Json, UserError

NOTED = "report.json"
"""What a run keeps for its page; `report/record.py` says what is in it."""
BUCKETS = 1000
"""Spans of steps of a series; one of up to twice as many steps is shown whole."""
BEFORE = 32
"""Steps before a step whose median says what is usual there."""
SPIKES = 20
"""At most so many spikes are shown, the largest."""
PROMPTS = 24
"""Prompts whose answers are shown."""
MOMENTS = 8
"""Evaluations of which answers are shown: the first, the last and some between."""
LONGEST = 4000
"""Characters of a prompt or an answer that are shown."""
DROPPED = 100
"""Dropped rows that are listed."""
COLUMNS = ("loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_second", "memory")
"""Numbers of every step that are drawn as they stand in metrics.jsonl."""
ROUTERS = ("balance", "largest_load", "smallest_load", "unused")
"""Numbers of routers, as a record has them under `routers`."""

Lines = list[dict[str, Json]]


class Spike(NamedTuple):
    """A step (counted from 1) that stands out, and in words how."""

    step: int
    why: str


def run_data(folder: Path) -> dict[str, object]:
    """All that a page shows of the run in `folder`.

    Raises:
        UserError: it is not the folder of a run, or its run.json is damaged.
    """
    facts = facts_of(folder)
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if line["step"] != 0]
    said = facts.to_json()
    for long in ("config", "mathematics"):
        said.pop(long, None)
    return {
        "name": folder.resolve().name,
        "folder": str(folder),
        "facts": said,
        "settings": flat(facts.config),
        "steps": len(steps),
        "series": _series(steps),
        "held": _held(lines),
        "evaluations": _evaluations(facts, lines),
        "spikes": [spike._asdict() for spike in spikes(folder, steps)],
        "samples": _samples(read_lines(folder / "samples.jsonl")),
        "ledger": _json(folder / "ledger.json"),
        "dropped": _dropped(folder / "dropped.jsonl"),
        "noted": _json(folder / NOTED),
    }


def facts_of(folder: Path) -> RunFacts:
    """The facts of the run in `folder`; UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the output folder of a run")
    known = read_facts(folder / "run.json")
    if not known and not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} is not the folder of a run: it has neither run.json nor metrics.jsonl"
        )
    return RunFacts.of_json(known)


def spikes(folder: Path, steps: Lines) -> list[Spike]:
    """The steps that stand out: those that were not finite, then the highest losses and gradient
    norms beside the steps before them; in their order.
    """
    chosen: dict[int, Spike] = {}
    for line in read_lines(folder / "bad_steps.jsonl")[:SPIKES]:
        step = _step(line)
        chosen[step] = Spike(step, "not finite: the update was not applied")
    found = _outliers(steps, "loss", "loss", 1.1)
    found += _outliers(steps, "grad_norm", "gradient norm", 3.0)
    found.sort(key=lambda pair: -pair[0])
    for _, spike in found:
        if len(chosen) < SPIKES:
            chosen.setdefault(spike.step, spike)
    return sorted(chosen.values())


def _step(line: Mapping[str, Json]) -> int:
    return int(str(line["step"]))


def _outliers(steps: Lines, name: str, word: str, least: float) -> list[tuple[float, Spike]]:
    """(how far out, spike) where a number is six deviations and `least` times above the median of
    the `BEFORE` steps before it; the page calls it by the `word`.
    """
    where, values = _column(steps, name)
    if len(values) <= BEFORE:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(values, BEFORE)[:-1]
    usual = np.median(windows, axis=1)
    distances = np.abs(windows - usual[:, None])
    deviation = 1.4826 * np.median(distances, axis=1)
    smallest = 1e-9 + 0.01 * np.abs(usual)
    here = values[BEFORE:]
    height = (here - usual) / np.maximum(deviation, smallest)
    out = (height > 6) & (here > least * usual)
    found: list[tuple[float, Spike]] = []
    for i in np.flatnonzero(out):
        step = int(where[BEFORE + i])
        why = f"{word} {here[i]:.4g}; the median of the {BEFORE} steps before is {usual[i]:.4g}"
        found.append((float(height[i]), Spike(step, why)))
    return found


def _column(lines: Lines, name: str) -> tuple[Float64, Float64]:
    """(steps, values) of a number, where it is one."""
    steps: list[int] = []
    values: list[float] = []
    for line in lines:
        value = line.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isfinite(value):
            steps.append(_step(line))
            values.append(value)
    return np.array(steps, np.float64), np.array(values, np.float64)


def _series(steps: Lines) -> dict[str, object]:
    for line in steps:
        line["targets_per_second"] = _rate(line)
    series: dict[str, object] = {}
    for name in (*COLUMNS, "targets_per_second", "tokens", "targets"):
        series[name] = _drawn(steps, name)
    return series | _of_routers(steps)


def _of_routers(steps: Lines) -> dict[str, object]:
    """The series of routers, as `router_NAME`; none where no step has them."""
    found: Lines = []
    for line in steps:
        numbers = line.get("routers")
        if isinstance(numbers, dict):
            found.append({"step": line["step"], **numbers})
    return {f"router_{name}": _drawn(found, name) for name in ROUTERS if found}


def _rate(line: Mapping[str, Json]) -> float | None:
    targets = line.get("targets")
    seconds = line.get("seconds")
    if isinstance(targets, int | float) and isinstance(seconds, int | float) and seconds > 0:
        return targets / seconds
    return None


def _drawn(lines: Lines, name: str) -> dict[str, object]:
    """A series as the page gets it: `steps` and `values`, and of a long one `means` as well."""
    steps, values = _column(lines, name)
    if len(steps) <= 2 * BUCKETS:
        return _points(steps, values)
    edges = np.linspace(0, len(steps), BUCKETS + 1).astype(int)
    kept: list[int] = []
    for begin, end in pairwise(edges):
        span = values[begin:end]
        lowest = int(begin + span.argmin())
        highest = int(begin + span.argmax())
        kept += sorted({lowest, highest})
    begins = edges[:-1]
    ends = edges[1:]
    means = np.add.reduceat(values, begins) / (ends - begins)
    middles = (begins + ends - 1) // 2
    drawn = _points(steps[kept], values[kept])
    drawn["means"] = _points(steps[middles], means)
    drawn["of"] = len(steps)
    return drawn


def _points(steps: Float64, values: Float64) -> dict[str, object]:
    """Points as the page gets them, of six digits."""
    short = [float(f"{value:.6g}") for value in values]
    return {"steps": steps.astype(int).tolist(), "values": short}


def _held(lines: Lines) -> dict[str, object]:
    """A series for each held-out number."""
    evaluated: Lines = []
    names: dict[str, None] = {}
    for line in lines:
        numbers = line.get("eval")
        if isinstance(numbers, dict):
            evaluated.append({**numbers, "step": line["step"]})
            names.update(dict.fromkeys(numbers))
    return {name: _drawn(evaluated, name) for name in names}


def _evaluations(facts: RunFacts, lines: Lines) -> dict[str, object]:
    """Held-out numbers before training, of the best model where one was kept, and at the end."""
    evaluated: dict[int, Json] = {}
    for line in lines:
        if line.get("eval"):
            evaluated[_step(line)] = line["eval"]
    moments: dict[str, object] = {}
    before = facts.eval_before or evaluated.get(0)
    if before:
        moments["before training"] = before
    best = facts.to_json().get("best")
    if isinstance(best, dict) and best.get("step") in evaluated:
        step = best["step"]
        moments[f"best, step {step}"] = evaluated[step]
    last = max(evaluated, default=0)
    if last:
        moments[f"after step {last}"] = facts.eval_after or evaluated[last]
    return moments


def _samples(lines: Lines) -> dict[str, object]:
    """Answers by prompt: `steps`, and for each prompt its reference and its answer at each step."""
    steps = sorted({_step(line) for line in lines})
    shown = [steps[i] for i in evenly(len(steps), MOMENTS)]
    prompts: dict[tuple[str, str], dict[str, object]] = {}
    for line in lines:
        if line["step"] not in shown:
            continue
        key = (str(line.get("prompt")), str(line.get("reference")))
        if key not in prompts and len(prompts) == PROMPTS:
            continue
        answers = prompts.setdefault(key, {})
        answers[str(line["step"])] = {
            "output": _cut(str(line.get("output"))),
            "ended": line.get("ended"),
            "tokens": line.get("tokens"),
            "scores": line.get("scores"),
        }
    rows: list[dict[str, object]] = []
    for (prompt, reference), answers in prompts.items():
        row = {"prompt": _cut(prompt), "reference": _cut(reference), "answers": answers}
        rows.append(row)
    return {"steps": shown, "evaluations": len(steps), "prompts": rows}


def _cut(text: str) -> str:
    more = len(text) - LONGEST
    if more <= 0:
        return text
    return f"{text[:LONGEST]} … and {more:,} more characters"


def _dropped(path: Path) -> list[Json]:
    """The first dropped rows."""
    if not path.is_file():
        return []
    found: list[Json] = []
    with path.open("rb") as file:
        for line in islice(file, DROPPED):
            row = _parsed(line)
            if isinstance(row, dict):
                found.append(row)
    return found


def _json(path: Path) -> Json:
    """What a file of JSON holds; None where there is none that can be read."""
    if not path.is_file():
        return None
    return _parsed(path.read_bytes())


def _parsed(text: bytes) -> Json:
    """The value that JSON says; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def names_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder, all different."""
    names = [folder.resolve().name for folder in folders]
    different: list[str] = []
    for name, folder in zip(names, folders, strict=True):
        if names.count(name) > 1:
            name = str(folder)
        different.append(name)
    return different
