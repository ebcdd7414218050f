"""Checkpoints as transactions: a folder either holds a verified state or does not exist.

Written beside its final name, every file synced, a manifest with sha256 sums last, then one rename. Loading verifies
the manifest and falls back to the newest checkpoint that passes. Tensors are safetensors, the rest is JSON: nothing in
a checkpoint can execute.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sftx.types import UserError

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True, slots=True)
class State:
    """Everything a run needs, beside its tensors, to continue: where it is, and which run it is."""

    step: int  # optimiser steps done
    plan: str  # fingerprint of the plan
    mathematics: str  # the settings that change results, as JSON
    total_tokens: int
    total_targets: int


def save(folder: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write `folder/step-N` and delete all but the newest `keep`. Raises OSError when the disk refuses."""
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    moments = _moments(model, optimizer)
    _require_space(folder, sum(t.nbytes for t in (*parameters.values(), *moments.values())))
    temporary.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in parameters.items()}, temporary / "weights.safetensors")
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    sums = {}
    for path in sorted(temporary.iterdir()):
        sums[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        _sync(path)
    (temporary / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    _sync(temporary / MANIFEST)
    _sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(folder)
    for old in _found(folder)[keep:]:
        shutil.rmtree(old)
    return final


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> State | None:
    """Load the newest checkpoint that verifies into `model` and `optimizer`; None if there is none.

    A damaged one is passed over with a line on stderr that names it.
    """
    for path in _found(folder):
        problem = _verify(path)
        if problem:
            print(f"warning: checkpoint {path} is damaged ({problem}); trying the one before", file=sys.stderr)
            continue
        state = State(**json.loads((path / "state.json").read_text(encoding="utf-8")))
        _load_parameters(model, load_file(path / "weights.safetensors"), path)
        _load_moments(model, optimizer, load_file(path / "optimizer.safetensors"))
        return state
    return None


def newest(folder: Path) -> State | None:
    """State of the newest checkpoint that verifies, without loading its tensors."""
    for path in _found(folder):
        if not _verify(path):
            return State(**json.loads((path / "state.json").read_text(encoding="utf-8")))
    return None


def _found(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    complete = [p for p in folder.glob("step-*") if p.suffix != ".tmp" and (p / MANIFEST).exists()]
    return sorted(complete, key=lambda p: p.name, reverse=True)


def _verify(path: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing."""
    try:
        sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        return "its manifest is not JSON"
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        if name not in sums or not (path / name).exists():
            return f"{name} is missing"
        if (path / name).stat().st_size != sums[name]["bytes"] or _sha256(path / name) != sums[name]["sha256"]:
            return f"{name} has changed since it was written"
    return ""


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state, one flat dictionary: `<parameter>/<exp_avg | exp_avg_sq | step>`."""
    return {
        f"{name}/{key}": value.detach().clone().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_parameters(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if set(expected) != set(tensors):
        odd = sorted(set(expected) ^ set(tensors))
        raise UserError(f"checkpoint {path} is of another model: {len(odd)} weights differ, first {odd[0]}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])


def _load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = tensor.to(parameter.device)


def _require_space(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise OSError(
            f"not enough space for a checkpoint in {folder}: {needed >> 20:,} MiB needed, {free >> 20:,} MiB free"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
