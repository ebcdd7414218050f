"""Hyper-parameter search over a trlx script.

`python -m sftx.compat.trlx.sweep --config sweep.yml script.py` runs it. The YAML is trlx's:
`tune_config` (mode, metric, search_alg, scheduler, num_samples) and, by dotted name, parameters
with a `strategy` and its `values`. Every trial is a process of its own that calls the script's
`main(hparams)`; the metric is read from the record of its run. Results are in `sweeps/SCRIPT/`:
`trials.csv` and `best.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from sftx.report.record import read_metrics
from sftx.settings.strict_yaml import parse
from sftx.sweep import optuna_study, run_process
from sftx.types import UserError

if TYPE_CHECKING:
    from optuna import Study, Trial

_RUN = """import json, os, runpy, sys
import sftx.compat.trlx
sys.modules['trlx'] = sftx.compat.trlx
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))
runpy.run_path(sys.argv[1], run_name='sweep')['main'](json.loads(sys.argv[2]))"""
# Strategy: how many values it takes at least and at most.
_STRATEGIES = {
    "uniform": (2, 2), "quniform": (3, 3), "loguniform": (2, 3), "qloguniform": (3, 4),
    "randn": (2, 2), "qrandn": (3, 3), "choice": (1, None), "grid": (1, None),
    "randint": (2, 2), "qrandint": (3, 3), "lograndint": (2, 3), "qlograndint": (3, 4),
}  # fmt: skip
_SAMPLERS = {"random": "random", "bayesopt": "tpe", "bohb": "tpe"}
_PRUNERS = {"fifo": "none", "hyperband": "hyperband", "hyperbandforbohb": "hyperband"}
_TUNE_KEYS = ("mode", "metric", "search_alg", "scheduler", "num_samples")


def read_config(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(tune_config, parameters by dotted name); UserError with everything wrong in the file."""
    problems: list[str] = []
    data, places = parse(Path(path).read_text(encoding="utf-8"), path, problems)
    if not isinstance(data, dict):
        data = {}
    tune = data.pop("tune_config", None) or {}
    for key in set(tune) - set(_TUNE_KEYS):
        known = ", ".join(_TUNE_KEYS)
        problems.append(f"{places['tune_config', key]}: tune_config.{key}: not known; {known} are")
    if "metric" not in tune or tune.get("mode") not in ("max", "min"):
        problems.append(f"{path}: tune_config: metric and mode (max or min) are needed")
    for name, spec in data.items():
        if not isinstance(spec, dict):
            spec = {}
        problem = _problem_of(spec)
        if problem:
            problems.append(f"{places[(name,)]}: {name}: {problem}")
    if problems:
        raise UserError("\n".join(problems))
    return tune, data


def _problem_of(spec: Mapping[str, Any]) -> str:
    """What is wrong with a parameter's strategy and values; empty if nothing."""
    strategy = spec.get("strategy")
    values = spec.get("values")
    if strategy not in _STRATEGIES:
        return f"strategy {strategy!r}; known: {', '.join(_STRATEGIES)}"
    low, high = _STRATEGIES[strategy]
    problem = f"{strategy} takes {low} to {high or 'many'} values, found {values}"
    if not isinstance(values, list) or len(values) < low:
        return problem
    if high is not None and len(values) > high:
        return problem
    return ""


def suggest(trial: Trial, name: str, strategy: str, values: list[Any]) -> Any:
    """A value for one parameter, drawn by `trial`; upper bounds of plain integers are exclusive."""
    if strategy in ("choice", "grid"):
        numbers = list(range(len(values)))
        return values[trial.suggest_categorical(name, numbers)]
    first, second, *rest = values
    log = "log" in strategy
    match strategy:
        case "randint" | "lograndint":
            return trial.suggest_int(name, first, second - 1, log=log)
        case "qrandint":
            return trial.suggest_int(name, first, second, step=rest[0])
        case "quniform":
            return trial.suggest_float(name, first, second, step=rest[0])
        case "randn" | "qrandn":
            share = trial.suggest_float(name, 1e-6, 1 - 1e-6)
            value = NormalDist(first, second).inv_cdf(share)
        case _:
            value = trial.suggest_float(name, first, second, log=log)
    if not strategy.startswith("q"):
        return value
    step = rest[0]
    value = round(value / step) * step
    return int(value) if strategy == "qlograndint" else value


def make_study(tune: Mapping[str, str], seed: int = 0) -> Study:
    """An optuna study for trlx's names of search algorithms and schedulers."""
    search = tune.get("search_alg") or "random"
    scheduler = tune.get("scheduler") or "fifo"
    sampler = _known("search_alg", search, _SAMPLERS)
    pruner = _known("scheduler", scheduler, _PRUNERS)
    minimize = tune["mode"] == "min"
    return optuna_study(sampler, seed, minimize, pruner)


def _known(key: str, name: str, known: Mapping[str, str]) -> str:
    """What optuna calls it."""
    if name not in known:
        raise UserError(f"tune_config.{key}: found {name!r}; known: {', '.join(known)}")
    return known[name]


def measured(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of `metric`, a statistic of evaluation or `loss`, of the run in `folder`."""
    found: list[tuple[int, float]] = []
    for record in read_metrics(folder / "sftx"):
        numbers = {**record, **(record["eval"] or {})}
        value = numbers.get(metric)
        if value is not None:
            found.append((record["step"], value))
    return found


def run_trial(
    trial: Trial, script: str, hparams: Mapping[str, object], folder: Path, metric: str
) -> tuple[str, float | None]:
    """Run the script; ("COMPLETE" | "PRUNED" | "FAIL", the last value of the metric)."""
    folder.mkdir(parents=True, exist_ok=True)
    hparams = {**hparams, "train.checkpoint_dir": str(folder)}
    command = [sys.executable, "-c", _RUN, script, json.dumps(hparams)]
    reported = -1

    def watch() -> bool:
        nonlocal reported
        for step, value in measured(folder, metric):
            if step > reported:
                reported = step
                trial.report(value, step)
        return trial.should_prune()

    code = run_process(command, folder / "output.txt", watch)
    values = measured(folder, metric)
    if code is None:
        return "PRUNED", values[-1][1]
    if code == 0 and values:
        return "COMPLETE", values[-1][1]
    return "FAIL", None


def sweep(config: str, script: str, output: Path) -> dict[str, Any]:
    """Run all trials; returns the best one's value, hparams and folder.

    Raises UserError if none succeeded.
    """
    tune, space = read_config(config)
    metric = tune["metric"]
    study = make_study(tune)
    from optuna.trial import TrialState

    rows: list[dict[str, Any]] = []
    points = _grid(space) * int(tune.get("num_samples", 1))
    for number, point in enumerate(points):
        study.enqueue_trial(point)
        trial = study.ask()
        hparams: dict[str, Any] = {}
        for name, spec in space.items():
            hparams[name] = suggest(trial, name, spec["strategy"], spec["values"])
        folder = output / f"trial_{number}"
        state, value = run_trial(trial, script, hparams, folder, metric)
        result = value if state == "COMPLETE" else None
        study.tell(trial, result, state=TrialState[state])
        row = {"trial": number, "state": state, metric: value, **hparams, "folder": str(folder)}
        rows.append(row)
        said = f"trial {number} {state.lower()}: {metric}={value} {json.dumps(hparams)}"
        print(said, flush=True)
        _write_rows(output / "trials.csv", rows)
    done = [row for row in rows if row["state"] == "COMPLETE"]
    if not done:
        raise UserError(
            f"no trial succeeded with a value of {metric}; see {output}/trial_0/output.txt"
        )
    choose = max if tune["mode"] == "max" else min
    best = choose(done, key=lambda row: row[metric])
    found = {
        "value": best[metric],
        "hparams": {name: best[name] for name in space},
        "folder": best["folder"],
    }
    text = json.dumps(found, indent=1)
    (output / "best.json").write_text(text + "\n", encoding="utf-8")
    return found


def _grid(space: Mapping[str, Mapping[str, Any]]) -> list[dict[str, int]]:
    """Every combination of the parameters with the strategy `grid`, as numbers of their values."""
    points: list[dict[str, int]] = [{}]
    for name, spec in space.items():
        if spec["strategy"] != "grid":
            continue
        numbers = range(len(spec["values"]))
        points = [{**point, name: number} for point in points for number in numbers]
    return points


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 2 with one message for a mistake in the input."""
    summary, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m sftx.compat.trlx.sweep", description=summary)
    parser.add_argument("script", help="a script with main(hparams)")
    parser.add_argument("--config", required=True, help="the sweep's YAML")
    parser.add_argument("--output", help="where results go; default: sweeps/SCRIPT")
    parser.add_argument(
        "-y", "--assume_yes", action="store_true", help="accepted; nothing is asked"
    )
    options = parser.parse_args(arguments)
    output = Path(options.output or f"sweeps/{Path(options.script).stem}")
    try:
        for path in (options.script, options.config):
            if not Path(path).exists():
                raise UserError(f"{path}: no such file")
        best = sweep(options.config, options.script, output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"best: {json.dumps(best)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
