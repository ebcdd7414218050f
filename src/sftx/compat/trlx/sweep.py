"""Hyper-parameter search over a trlx script: `python -m sftx.compat.trlx.sweep --config sweep.yml
script.py`.

The YAML is trlx's: `tune_config` (mode, metric, search_alg, scheduler, num_samples) and, by dotted
name, parameters with a `strategy` and its `values`. Every trial is a process of its own that calls
the script's `main(hparams)`; the metric is read from the record of its run. Results are in
`sweeps/SCRIPT/`: `trials.csv` and `best.json`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any

from sftx.settings.strict_yaml import parse
from sftx.types import UserError

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
_TUNE_KEYS = ("mode", "metric", "search_alg", "scheduler", "num_samples")


def read_config(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(tune_config, parameters by dotted name). Raises UserError with everything wrong in the file."""
    problems: list[str] = []
    data, places = parse(Path(path).read_text(encoding="utf-8"), path, problems)
    data = data if isinstance(data, dict) else {}
    tune = data.pop("tune_config", None) or {}
    for key in set(tune) - set(_TUNE_KEYS):
        problems.append(
            f"{places['tune_config', key]}: tune_config.{key}: not known; {', '.join(_TUNE_KEYS)} "
            "are"
        )
    if "metric" not in tune or tune.get("mode") not in ("max", "min"):
        problems.append(f"{path}: tune_config: metric and mode (max or min) are needed")
    for name, values in data.items():
        strategy, given = (
            (values.get("strategy"), values.get("values"))
            if isinstance(values, dict)
            else (None, None)
        )
        if strategy not in _STRATEGIES:
            problems.append(
                f"{places[(name,)]}: {name}: strategy {strategy!r}; known: {', '.join(_STRATEGIES)}"
            )
            continue
        low, high = _STRATEGIES[strategy]
        if not isinstance(given, list) or not low <= len(given) <= (high or len(given)):
            problems.append(
                f"{places[(name,)]}: {name}: {strategy} takes {low} to {high or 'many'} values, "
                f"found {given}"
            )
    if problems:
        raise UserError("\n".join(problems))
    return tune, data


def suggest(trial: Any, name: str, strategy: str, values: list[Any]) -> Any:
    """A value for one parameter, drawn by optuna's `trial`. Upper bounds of plain integers are
    exclusive.
    """
    match strategy:
        case "choice" | "grid":
            return values[trial.suggest_categorical(name, list(range(len(values))))]
        case "randn" | "qrandn":
            value = NormalDist(values[0], values[1]).inv_cdf(
                trial.suggest_float(name, 1e-6, 1 - 1e-6)
            )
            return value if strategy == "randn" else round(value / values[2]) * values[2]
        case "randint" | "lograndint":
            return trial.suggest_int(name, values[0], values[1] - 1, log=strategy.startswith("log"))
        case "qrandint":
            return trial.suggest_int(name, values[0], values[1], step=values[2])
        case "quniform":
            return trial.suggest_float(name, values[0], values[1], step=values[2])
        case "uniform" | "loguniform":
            return trial.suggest_float(name, values[0], values[1], log=strategy.startswith("log"))
        case _:  # quantised and on a logarithmic scale
            value = (
                round(trial.suggest_float(name, values[0], values[1], log=True) / values[2])
                * values[2]
            )
            return int(value) if strategy == "qlograndint" else value


def make_study(tune: dict[str, Any], seed: int = 0) -> Any:
    """An optuna study for trlx's names of search algorithms and schedulers."""
    try:
        import optuna
    except ImportError:
        raise UserError("a sweep needs optuna: pip install 'sftx[sweep]'") from None
    samplers = {"random": optuna.samplers.RandomSampler, "bayesopt": optuna.samplers.TPESampler}
    samplers["bohb"] = optuna.samplers.TPESampler
    pruners = {"fifo": optuna.pruners.NopPruner, "hyperband": optuna.pruners.HyperbandPruner}
    pruners["hyperbandforbohb"] = optuna.pruners.HyperbandPruner
    search, scheduler = tune.get("search_alg") or "random", tune.get("scheduler") or "fifo"
    for key, value, known in (("search_alg", search, samplers), ("scheduler", scheduler, pruners)):
        if value not in known:
            raise UserError(f"tune_config.{key}: found {value!r}; known: {', '.join(known)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "maximize" if tune["mode"] == "max" else "minimize"
    return optuna.create_study(
        direction=direction, sampler=samplers[search](seed=seed), pruner=pruners[scheduler]()
    )


def measured(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of `metric` in the record of the run in `folder`: a statistic of evaluation, or
    `loss`.
    """
    path = folder / "sftx" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines if line]
    found = [
        (record["step"], (record["eval"] or {}).get(metric, record.get(metric)))
        for record in records
    ]
    return [(step, value) for step, value in found if value is not None]


def run_trial(
    trial: Any, script: str, hparams: dict[str, Any], folder: Path, metric: str
) -> tuple[str, float | None]:
    """Run the script with `hparams`; ("COMPLETE" | "PRUNED" | "FAIL", the last value of the
    metric).
    """
    folder.mkdir(parents=True, exist_ok=True)
    hparams = {**hparams, "train.checkpoint_dir": str(folder)}
    with (folder / "output.txt").open("w") as output:
        command = [sys.executable, "-c", _RUN, script, json.dumps(hparams)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        reported, running = -1, True
        while running:
            running = process.poll() is None
            for step, value in measured(folder, metric):
                if step > reported:
                    reported = step
                    trial.report(value, step)
            if running and trial.should_prune():
                process.terminate()
                process.wait()
                return "PRUNED", measured(folder, metric)[-1][1]
            time.sleep(0.5 if running else 0)
    values = measured(folder, metric)
    return ("COMPLETE", values[-1][1]) if process.returncode == 0 and values else ("FAIL", None)


def sweep(config: str, script: str, output: Path) -> dict[str, Any]:
    """Run all trials; returns the best one's {"value", "hparams", "folder"}. Raises UserError if
    none succeeded.
    """
    from optuna.trial import TrialState

    tune, space = read_config(config)
    study = make_study(tune)
    grid = {
        name: range(len(spec["values"]))
        for name, spec in space.items()
        if spec["strategy"] == "grid"
    }
    combinations = [
        dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())
    ]
    rows: list[dict[str, Any]] = []
    for number, point in enumerate(combinations * int(tune.get("num_samples", 1))):
        study.enqueue_trial(point)
        trial = study.ask()
        hparams = {
            name: suggest(trial, name, spec["strategy"], spec["values"])
            for name, spec in space.items()
        }
        folder = output / f"trial_{number}"
        state, value = run_trial(trial, script, hparams, folder, tune["metric"])
        study.tell(trial, value if state == "COMPLETE" else None, state=TrialState[state])
        rows.append(
            {
                "trial": number,
                "state": state,
                tune["metric"]: value,
                **hparams,
                "folder": str(folder),
            }
        )
        print(
            f"trial {number} {state.lower()}: {tune['metric']}={value} {json.dumps(hparams)}",
            flush=True,
        )
        with (output / "trials.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    done = [row for row in rows if row["state"] == "COMPLETE"]
    if not done:
        raise UserError(
            f"no trial succeeded with a value of {tune['metric']}; see {output}/trial_0/output.txt"
        )
    best = (max if tune["mode"] == "max" else min)(done, key=lambda row: row[tune["metric"]])
    result = {
        "value": best[tune["metric"]],
        "hparams": {name: best[name] for name in space},
        "folder": best["folder"],
    }
    (output / "best.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


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
    try:
        if not Path(options.script).exists() or not Path(options.config).exists():
            missing = options.script if not Path(options.script).exists() else options.config
            raise UserError(f"{missing}: no such file")
        best = sweep(
            options.config,
            options.script,
            Path(options.output or f"sweeps/{Path(options.script).stem}"),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"best: {json.dumps(best)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
