"""What a run may not change when it is continued: the settings and data that decide its result."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from sftx.report.record import Run
from sftx.settings.schema import Config
from sftx.types import UserError


def mathematics(
    config: Config, fingerprint: str, max_length: int, precision: torch.dtype
) -> dict[str, Any]:
    """The settings that decide the result, as plain values: what a run may not change when it is
    continued.
    """
    facts = config.model_dump(
        mode="json", include={"model", "batch", "optim", "loss", "adapter", "seed"}
    )
    facts["data"] = {"fingerprint": fingerprint, "max_length": max_length}
    facts["runtime"] = {"precision": name_of(precision)}  # what `auto` meant here
    return facts


def name_of(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def changes(config: Config, run: Run, mathematics: dict[str, Any]) -> dict[str, list[Any]]:
    """{setting: [then, now]} of what differs from the run in the folder; UserError if it may not
    differ.
    """
    now, allowed = dotted(mathematics), config.checkpoint.resume_allow
    for name in allowed:
        if not any(f"{key}.".startswith(f"{name}.") for key in now):
            close = difflib.get_close_matches(name, now, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"checkpoint.resume_allow: {name!r} is no setting that decides the result{hint}"
            )
    if not run.exists:
        return {}
    then = dotted(run.facts["mathematics"]) | {"runtime.precision": run.facts["precision"]}
    keys = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if refused := [
        key for key in keys if not any(f"{key}.".startswith(f"{name}.") for name in allowed)
    ]:
        diff = "\n".join(
            f"  {key}: {then.get(key)!r} in the run, {now.get(key)!r} now" for key in refused
        )
        raise UserError(
            f"output: {run.folder} holds a run with other settings or data; choose another "
            "folder, or allow the "
            f"difference with checkpoint.resume_allow.\n{diff}"
        )
    return {key: [then.get(key), now.get(key)] for key in keys}


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
