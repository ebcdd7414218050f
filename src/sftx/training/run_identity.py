"""What a run may not change when it is continued, and where it begins.

The settings and data that decide its result are recorded in run.json; a run in the same folder is
continued only under the same ones, or with the differences that the user allows.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sftx.data.plan import Plan
from sftx.model.pack_loss import PackLoss
from sftx.model.runtime import name_of
from sftx.report.lock import LOCK, OWNER
from sftx.report.record import Run
from sftx.settings.flat import flat
from sftx.settings.schema import Config
from sftx.training import checkpoint
from sftx.types import UserError

OWN = {LOCK, OWNER, "base", "run.json"}
"""What a run may leave in its folder that ended before its record was begun."""


def refuse_other_files(config: Config) -> None:
    """UserError where the output folder holds files and no run: some would be overwritten."""
    source = Path(config.model.path)
    target = Path(config.output)
    if not target.is_dir():
        return
    if source.exists() and source.resolve() == target.resolve():
        raise UserError(
            f"output: {target} is the folder of the model itself; choose another, it would be "
            "overwritten"
        )
    if (target / "run.json").exists():
        return
    names = [path.name for path in target.iterdir()]
    others = sorted(name for name in names if name.removesuffix(".tmp") not in OWN)
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(
            f"output: {target} holds {shown} and no run of sftx; its files could be overwritten. "
            "Choose a folder that is empty or not there yet"
        )


def refuse_wrong_folder(config: Config, run: Run) -> None:
    """UserError where the folder holds other files or a damaged record, or a run against
    `checkpoint.resume`.
    """
    refuse_other_files(config)
    run.check()
    if config.checkpoint.resume == "must" and not run.exists:
        raise UserError(f"checkpoint.resume: must, but there is no run in {run.folder}")
    if config.checkpoint.resume == "never" and run.exists:
        raise UserError(
            f"checkpoint.resume: never, but {run.folder} holds a run; choose another output folder"
        )


def mathematics(
    config: Config, fingerprint: str, max_length: int, precision: torch.dtype
) -> dict[str, Any]:
    """The settings that decide the result, as plain values."""
    facts = config.model_dump(
        mode="json", include={"model", "batch", "optim", "loss", "adapter", "seed"}
    )
    facts["data"] = {"fingerprint": fingerprint, "max_length": max_length}
    facts["runtime"] = {"precision": name_of(precision)}  # what `auto` meant here
    return facts


def changes(config: Config, run: Run, mathematics: dict[str, Any]) -> dict[str, list[Any]]:
    """{setting: [then, now]} of what differs from the run in the folder; UserError if it may not
    differ.
    """
    now = flat(mathematics)
    allowed = config.checkpoint.resume_allow
    _refuse_unknown(allowed, now)
    if not run.exists:
        return {}
    then = {"batch.group_by": "none"}  # what older runs did
    # What they do not say.
    then |= {name: now.get(name) for name in ("data.held_out", "model.files")}
    then |= flat(run.facts.mathematics) | {"runtime.precision": run.facts.precision}
    settings = sorted(then.keys() | now.keys())
    keys = [key for key in settings if then.get(key) != now.get(key)]
    refused = [key for key in keys if not _within(key, allowed)]
    if refused:
        lines = [f"  {key}: {then.get(key)!r} in the run, {now.get(key)!r} now" for key in refused]
        raise UserError(
            f"output: {run.folder} holds a run with other settings or data; choose another "
            "folder, or allow the difference with checkpoint.resume_allow.\n" + "\n".join(lines)
        )
    return {key: [then.get(key), now.get(key)] for key in keys}


def _refuse_unknown(names: list[str], settings: dict[str, Any]) -> None:
    for name in names:
        if not any(_within(key, [name]) for key in settings):
            close = difflib.get_close_matches(name, settings, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"checkpoint.resume_allow: {name!r} is no setting that decides the result{hint}"
            )


def _within(key: str, names: list[str]) -> bool:
    """Whether a dotted key is one of the names, or in a section that is."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


@dataclass
class Beginning:
    """Where a run begins: at step 0, after a checkpoint, or at the end of a finished run."""

    state: checkpoint.State
    notes: list[str] = field(default_factory=list[str])
    eval_before: dict[str, float] | None = None  # of the earlier run
    carried: dict[str, str] = field(default_factory=dict[str, str])  # records up to the checkpoint
    changed: bool = False  # whether settings differ from those of the earlier run
    changes: list[dict[str, Any]] | None = None  # now and before, for run.json


def find_beginning(
    config: Config,
    run: Run,
    plan: Plan,
    mathematics: dict[str, Any],
    model: PackLoss,
    optimizer: torch.optim.Optimizer,
) -> Beginning:
    """Load the newest good checkpoint of the run in the folder, if there is one, into `model` and
    `optimizer`.

    Raises UserError where the run there is another one, or cannot be continued as it is allowed to.
    """
    changed = changes(config, run, mathematics)
    found = Beginning(checkpoint.State(0, plan.fingerprint, mathematics), changed=bool(changed))
    if run.finished and not changed:
        found.state.step = plan.num_steps
        return found
    if run.exists:
        _restore(found, run, model, optimizer)
        _refuse_no_checkpoint(found, run, plan)
        found.notes += _lost_steps(found, run)
    if changed:
        step = found.state.step
        found.notes += [
            f"from step {step + 1:,} on, {key} is {new!r} (was {old!r})"
            for key, (old, new) in changed.items()
        ]
        found.changes = [*(found.changes or []), {"step": step, **changed}]
    return found


def _restore(found: Beginning, run: Run, model: PackLoss, optimizer: torch.optim.Optimizer) -> None:
    folder = run.folder / "checkpoints"
    now = found.state
    state = checkpoint.restore(folder, model, optimizer)
    if state is None:
        return
    assert found.changed or state.plan == now.plan, "equal settings and data give an equal plan"
    found.state = replace(state, plan=now.plan, mathematics=now.mathematics)
    found.eval_before = run.facts.eval_before
    found.changes = run.facts.changed
    if run.writes:
        found.carried = checkpoint.records(folder, state.step)
        found.notes += run.unlike(state.step, found.carried)


def _refuse_no_checkpoint(found: Beginning, run: Run, plan: Plan) -> None:
    step = found.state.step
    if found.changed and not 0 < step <= plan.num_steps:
        there = f"the one of step {step}" if step else "none"
        raise UserError(
            f"checkpoint.resume_allow: {run.folder} has no checkpoint to continue "
            f"{plan.num_steps} steps from (found: {there}); choose another folder for a new run"
        )


def _lost_steps(found: Beginning, run: Run) -> list[str]:
    """What to say of steps that an earlier run took and no checkpoint holds."""
    lost = [line["step"] for line in run.metrics() if line["step"]]
    if found.state.step or not lost:
        return []
    saved = "saved nothing"
    if any((run.folder / "checkpoints").glob("step-*")):
        saved = "left no checkpoint that can be used"
    return [f"an earlier run stopped after step {lost[-1]:,} and {saved}: starting over"]
