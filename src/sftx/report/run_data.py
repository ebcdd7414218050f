"""What the page of a run shows, read from the run's folder.

A run of any length makes a page of about the same size: a long series is cut into `BUCKETS` equal
spans of steps, of each of which the page gets the lowest, the highest and the mean value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftx.evenly import evenly
from sftx.report.facts import RunFacts, read_facts
from sftx.report.record import read_lines
from sftx.settings.flat import flat
from sftx.types import Json, UserError

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
Float64 = NDArray[np.float64]


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
        step = int(str(line["step"]))
        chosen[step] = Spike(step, "not finite: the update was not applied")
    found = _outliers(steps, "loss", 1.1)
    found += _outliers(steps, "grad_norm", 3.0)
    found.sort(key=lambda pair: -pair[0])
    for _, spike in found:
        if len(chosen) < SPIKES:
            chosen.setdefault(spike.step, spike)
    return sorted(chosen.values())


def _outliers(steps: Lines, name: str, least: float) -> list[tuple[float, Spike]]:
    """(how far out, spike) where a number is six deviations and `least` times above the median of
    the `BEFORE` steps before it.
    """
    where, values = _column(steps, name)
    if len(values) <= BEFORE:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(values, BEFORE)[:-1]
    usual = np.median(windows, axis=1)
    deviation = 1.4826 * np.median(np.abs(windows - usual[:, None]), axis=1)
    here = values[BEFORE:]
    height = (here - usual) / np.maximum(deviation, 1e-9 + 0.01 * np.abs(usual))
    out = (height > 6) & (here > least * usual)
    word = {"grad_norm": "gradient norm"}.get(name, name)
    found: list[tuple[float, Spike]] = []
    for i in np.flatnonzero(out):
        why = f"{word} {here[i]:.4g}; the median of the {BEFORE} steps before is {usual[i]:.4g}"
        found.append((float(height[i]), Spike(int(where[BEFORE + i]), why)))
    return found


def _column(lines: Lines, name: str) -> tuple[Float64, Float64]:
    """(steps, values) of a number, where it is one."""
    found = [(line["step"], line[name]) for line in lines if _is_number(line.get(name))]
    pairs = np.array(found, np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs[:, 1])]
    return pairs[:, 0], pairs[:, 1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _series(steps: Lines) -> dict[str, object]:
    for line in steps:
        line["targets_per_second"] = _rate(line)
    names = (*COLUMNS, "targets_per_second", "tokens", "targets")
    series = {name: _drawn(steps, name) for name in names}
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
        return {"steps": steps.astype(int).tolist(), "values": _short(values)}
    edges = np.linspace(0, len(steps), BUCKETS + 1).astype(int)
    kept: list[int] = []
    for begin, end in pairwise(edges):
        span = values[begin:end]
        lowest = int(begin + span.argmin())
        highest = int(begin + span.argmax())
        kept += sorted({lowest, highest})
    counts = np.diff(edges)
    means = np.add.reduceat(values, edges[:-1]) / counts
    middles = steps[(edges[:-1] + edges[1:] - 1) // 2]
    return {
        "steps": steps[kept].astype(int).tolist(),
        "values": _short(values[kept]),
        "means": {"steps": middles.astype(int).tolist(), "values": _short(means)},
        "of": len(steps),
    }


def _short(values: Float64) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


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
    evaluated = {int(str(line["step"])): line["eval"] for line in lines if line.get("eval")}
    best = facts.to_json().get("best")
    last = max(evaluated, default=0)
    moments: dict[str, object] = {"before training": facts.eval_before or evaluated.get(0)}
    if isinstance(best, dict) and best.get("step") in evaluated:
        moments[f"best, step {best['step']}"] = evaluated[best["step"]]
    if last:
        moments[f"after step {last}"] = facts.eval_after or evaluated[last]
    return {when: numbers for when, numbers in moments.items() if numbers}


def _samples(lines: Lines) -> dict[str, object]:
    """Answers by prompt: `steps`, and for each prompt its reference and its answer at each step."""
    steps = sorted({int(str(line["step"])) for line in lines})
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
    return text if more <= 0 else f"{text[:LONGEST]} … and {more:,} more characters"


def _dropped(path: Path) -> list[Json]:
    """The first dropped rows."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        found = [_parsed(line) for line in islice(file, DROPPED)]
    return [line for line in found if isinstance(line, dict)]


def _json(path: Path) -> Json:
    """What a file of JSON holds; None where there is none that can be read."""
    return _parsed(path.read_bytes()) if path.is_file() else None


def _parsed(text: bytes) -> Json:
    """The value that JSON says; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def names_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder, all different."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder)
        for name, folder in zip(names, folders, strict=True)
    ]
