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
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from sftx.report.record import METRICS, read_lines
from sftx.settings.read_yaml import parse
from sftx.sweep import optuna_study, run_process
from sftx.types import UserError

if TYPE_CHECKING:
    from optuna import Study, Trial

_RUN = """import json, os, runpy, sys
import sftx.compat.trlx
sys.modules['trlx'] = sftx.compat.trlx
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))
runpy.run_path(sys.argv[1], run_name='sweep')['main'](json.loads(sys.argv[2]))"""
_MANY = 1 << 30
# Strategy: how many values it takes at least and at most.
_STRATEGIES = {
    "uniform": (2, 2),
    "quniform": (3, 3),
    "loguniform": (2, 3),
    "qloguniform": (3, 4),
    "randn": (2, 2),
    "qrandn": (3, 3),
    "choice": (1, _MANY),
    "grid": (1, _MANY),
    "randint": (2, 2),
    "qrandint": (3, 3),
    "lograndint": (2, 3),
    "qlograndint": (3, 4),
}
_SAMPLERS = {"random": "random", "bayesopt": "tpe", "bohb": "tpe"}
_PRUNERS = {"fifo": "none", "hyperband": "hyperband", "hyperbandforbohb": "hyperband"}
_TUNE_KEYS = ("mode", "metric", "search_alg", "scheduler", "num_samples")
Row = dict[str, Any]
"""What trials.csv says of a trial."""


def read_config(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(tune_config, parameters by dotted name); UserError with everything wrong in the file."""
    problems: list[str] = []
    data, places = parse(Path(path).read_text(encoding="utf-8"), path, problems)
    data = data if isinstance(data, dict) else {}
    tune = data.pop("tune_config", None) or {}
    for key in set(tune) - set(_TUNE_KEYS):
        known = ", ".join(_TUNE_KEYS)
        problems.append(f"{places['tune_config', key]}: tune_config.{key}: not known; {known} are")
    if "metric" not in tune or tune.get("mode") not in ("max", "min"):
        problems.append(f"{path}: tune_config: metric and mode (max or min) are needed")
    for name, spec in data.items():
        problem = _problem_of(spec if isinstance(spec, dict) else {})
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
    least, most = _STRATEGIES[strategy]
    if not isinstance(values, list) or not least <= len(values) <= most:
        many = "many" if most == _MANY else most
        return f"{strategy} takes {least} to {many} values, found {values}"
    return ""


def suggest(trial: Trial, name: str, strategy: str, values: list[Any]) -> Any:
    """A value for one parameter, drawn by `trial`; upper bounds of plain integers are exclusive."""
    if strategy in ("choice", "grid"):
        number = trial.suggest_categorical(name, list(range(len(values))))
        return values[number]
    log = "log" in strategy
    low, high = values[:2]
    match strategy:
        case "randint" | "lograndint":
            return trial.suggest_int(name, low, high - 1, log=log)
        case "qrandint":
            return trial.suggest_int(name, low, high, step=values[2])
        case "quniform":
            return trial.suggest_float(name, low, high, step=values[2])
        case "randn" | "qrandn":
            share = trial.suggest_float(name, 1e-6, 1 - 1e-6)
            value = NormalDist(low, high).inv_cdf(share)
        case _:
            value = trial.suggest_float(name, low, high, log=log)
    if not strategy.startswith("q"):
        return value
    step = values[2]
    value = round(value / step) * step
    return int(value) if strategy == "qlograndint" else value


def make_study(tune: Mapping[str, str], seed: int = 0) -> Study:
    """An optuna study for trlx's names of search algorithms and schedulers."""
    sampler = _meant(tune, "search_alg", "random", _SAMPLERS)
    pruner = _meant(tune, "scheduler", "fifo", _PRUNERS)
    return optuna_study(sampler, seed, tune["mode"] == "min", pruner)


def _meant(tune: Mapping[str, str], key: str, default: str, known: Mapping[str, str]) -> str:
    """sftx's name for what trlx calls it."""
    value = tune.get(key) or default
    if value not in known:
        raise UserError(f"tune_config.{key}: found {value!r}; known: {', '.join(known)}")
    return known[value]


def measured(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of `metric`, a statistic of evaluation or `loss`, of the run in `folder`."""
    found: list[tuple[int, float]] = []
    for record in read_lines(folder / "sftx" / METRICS):
        numbers = {**record, **(record["eval"] or {})}
        if numbers.get(metric) is not None:
            found.append((record["step"], numbers[metric]))
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
    values = [value for _, value in measured(folder, metric)]
    if code is None:
        return "PRUNED", values[-1]
    if code != 0 or not values:
        return "FAIL", None
    return "COMPLETE", values[-1]


def sweep(config: str, script: str, output: Path) -> Row:
    """Run all trials; returns the best one's value, hparams and folder.

    Raises UserError if none succeeded.
    """
    tune, space = read_config(config)
    study = make_study(tune)
    rows: list[Row] = []
    for point in _grid(space) * int(tune.get("num_samples", 1)):
        study.enqueue_trial(point)
        folder = output / f"trial_{len(rows)}"
        row = _tried(study, space, script, folder, tune["metric"])
        rows.append({"trial": len(rows), **row})
        _write_rows(output / "trials.csv", rows)
    result = _best(rows, space, tune, output)
    text = json.dumps(result, indent=1)
    (output / "best.json").write_text(text + "\n", encoding="utf-8")
    return result


def _tried(
    study: Study, space: Mapping[str, Mapping[str, Any]], script: str, folder: Path, metric: str
) -> Row:
    """Run the next trial of the study, and say what became of it."""
    from optuna.trial import TrialState

    trial = study.ask()
    hparams = {
        name: suggest(trial, name, spec["strategy"], spec["values"]) for name, spec in space.items()
    }
    state, value = run_trial(trial, script, hparams, folder, metric)
    told = value if state == "COMPLETE" else None
    study.tell(trial, told, state=TrialState[state])
    said = f"{state.lower()}: {metric}={value} {json.dumps(hparams)}"
    print(f"trial {trial.number} {said}", flush=True)
    return {"state": state, metric: value, **hparams, "folder": str(folder)}


def _best(
    rows: Sequence[Row], space: Mapping[str, object], tune: Mapping[str, str], output: Path
) -> Row:
    """Value, hparams and folder of the best trial; UserError if none succeeded."""
    metric = tune["metric"]
    done = [row for row in rows if row["state"] == "COMPLETE"]
    if not done:
        raise UserError(
            f"no trial succeeded with a value of {metric}; see {output}/trial_0/output.txt"
        )
    choose = max if tune["mode"] == "max" else min
    best = choose(done, key=lambda row: row[metric])
    hparams = {name: best[name] for name in space}
    return {"value": best[metric], "hparams": hparams, "folder": best["folder"]}


def _grid(space: Mapping[str, Mapping[str, Any]]) -> list[dict[str, int]]:
    """Every combination of the parameters with the strategy `grid`, as numbers of their values."""
    counts = {
        name: range(len(spec["values"]))
        for name, spec in space.items()
        if spec["strategy"] == "grid"
    }
    points = itertools.product(*counts.values())
    return [dict(zip(counts, point, strict=True)) for point in points]


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 2 with one message for a mistake in the input."""
    parser = argparse.ArgumentParser(
        prog="python -m sftx.compat.trlx.sweep", description=(__doc__ or "").split("\n\n")[0]
    )
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
