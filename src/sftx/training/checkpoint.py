"""Checkpoints as transactions: a folder either holds a verified state or does not exist.

Written beside its final name, every file synced, a manifest with sha256 sums last, then one rename,
which is synced too. Loading verifies the manifest and falls back to the newest checkpoint that
passes. Tensors are safetensors, the rest is JSON, the run's record up to this step included:
nothing in a checkpoint can execute.
"""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from sftx import distributed
from sftx.files import make_folder, sync
from sftx.model.shard import check_replicas, load_tensors, save_tensors, tensor_facts
from sftx.printable import printable
from sftx.report.record import RECORDS
from sftx.training.async_writer import AsyncWriter
from sftx.types import UserError

MANIFEST = "MANIFEST.json"
SPARE = 1.2
"""Times what the tensors take: beside them there are names, a manifest, a tokenizer."""
_NAME = "step-" + "[0-9]" * 8


@dataclass(slots=True)
class State:
    """Where a run stands, and which run it is: all it needs, beside its tensors, to continue."""

    step: int  # optimiser steps done
    plan: str  # fingerprint of the plan
    mathematics: dict[str, Any]  # the settings that change results
    total_tokens: int = 0
    total_targets: int = 0
    bad_steps: int = 0  # in a row, up to this one
    seconds: float = 0.0  # of all steps so far


def save(
    folder: Path,
    state: State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    background: AsyncWriter | None = None,
    records: Mapping[str, str] | None = None,
    optional: bool = False,
    costs: Mapping[int, float] | None = None,
    sealed: Callable[[], None] | None = None,
) -> Path:
    """Write `folder/step-N`, and delete the others but the newest `keep`, this one included, and
    the one that `costs`, by step, calls the lowest.

    With `background` only a copy is made here, and written there. `records` = the texts of the
    run's records so far, by the names of their files. `sealed` is called on the main rank once the
    checkpoint is whole. Where there is no room, raises UserError, or,
    where the checkpoint is `optional`, writes none and says so.
    """
    final = folder / f"step-{state.step:08d}"
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tensors = {"weights": trained, "optimizer": _moments(model, optimizer)}
    copied = background is not None
    on_host = {
        name: {key: _on_host(tensor, copied) for key, tensor in some.items()}
        for name, some in tensors.items()
    }
    text = json.dumps(asdict(state), indent=1)
    texts = {"state.json": text, **(records or {})}
    work = partial(_save, final, texts, on_host, keep, optional, dict(costs or {}), sealed)
    if background is None:
        work()
    else:
        background.start(work)
    return final


def _save(
    final: Path,
    texts: dict[str, str],
    tensors: dict[str, dict[str, Tensor]],
    keep: int,
    optional: bool,
    costs: Mapping[int, float],
    sealed: Callable[[], None] | None,
) -> None:
    folder = final.parent
    main = distributed.is_main()
    # A state is saved twice where a signal comes twice: the first is as good.
    if distributed.broadcast(main and final.exists() and not _verify(final), saving=True):
        return
    needed = _size(texts, tensors)
    problem = distributed.broadcast(_shortage(folder, needed) if main else "", saving=True)
    if problem:
        if not optional:
            raise UserError(problem)
        _warn_of_nothing_saved(final, problem)
        return
    check_replicas(tensors["weights"])
    temporary = folder / f"{final.name}.tmp"
    try:
        _write(temporary, final, texts, tensors)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{_no_room(folder, needed)} ({error})") from error
    if main:
        _delete_old(folder, keep, costs)
        if sealed is not None:
            sealed()


def _size(texts: dict[str, str], tensors: dict[str, dict[str, Tensor]]) -> int:
    """Bytes of a checkpoint, about."""
    size = sum(len(text) for text in texts.values())
    for some in tensors.values():
        size += sum(tensor.nbytes for tensor in some.values())
    return size


def _warn_of_nothing_saved(final: Path, problem: str) -> None:
    if distributed.is_main():
        step = step_of(final)
        print(f"warning: nothing was saved after step {step}: {problem}", file=sys.stderr)


def _write(
    temporary: Path, final: Path, texts: dict[str, str], tensors: dict[str, dict[str, Tensor]]
) -> None:
    if distributed.is_main():
        make_folder(final.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    distributed.barrier(saving=True)
    if distributed.is_joined():
        save_tensors(temporary, tensors["weights"] | tensors["optimizer"])
        # Each rank its own: another machine's memory cannot be synced from here.
        for path in temporary.iterdir():
            sync(path)
    else:
        for name, some in tensors.items():
            save_file(some, temporary / f"{name}.safetensors")
    distributed.barrier(saving=True)
    if distributed.is_main():
        _seal(temporary, final, texts)
    distributed.barrier(saving=True)


def _seal(temporary: Path, final: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (temporary / name).write_text(text, encoding="utf-8")
    sums = {}
    for path in sorted(temporary.iterdir()):
        sums[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        sync(path)
    (temporary / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    sync(temporary / MANIFEST)
    sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    sync(final.parent)


def _delete_old(folder: Path, keep: int, costs: Mapping[int, float]) -> None:
    """Delete all checkpoints but the newest `keep` and the best one; damaged ones, and what killed
    processes left, too.
    """
    sound = [path for path in folders(folder) if not _verify(path, read=False)]
    judged = [(costs[step_of(path)], path) for path in sound if step_of(path) in costs]
    kept = {*sound[:keep], *(path for _, path in sorted(judged)[:1])}
    for path in [*folders(folder), *folder.glob(f"{_NAME}.tmp")]:
        if path not in kept:
            shutil.rmtree(path)


def _on_host(tensor: Tensor, copied: bool) -> Tensor:
    """A tensor as it is written; a copy of its own where training goes on meanwhile."""
    return tensor.detach().to("cpu", copy=copied).contiguous()


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> State | None:
    """Load the newest checkpoint that verifies into `model` and `optimizer`; None if there is none.

    A damaged one is passed over with a line on stderr that names it. Any number of ranks may have
    written it.
    """
    path = distributed.broadcast(_newest_good(folder) if distributed.is_main() else None)
    if path is None:
        return None
    _load(path, model, optimizer)
    return _state(path)


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Weights, and where there is an optimizer its moments too."""
    facts = tensor_facts(path)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    odd = sorted({name for name in facts if "/" not in name} ^ parameters.keys())
    if odd:
        raise UserError(
            f"checkpoint {path} is of another model: {len(odd)} weights differ, first {odd[0]}"
        )
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in parameters.items()}
    if optimizer is not None:
        tensors |= {
            name: moment for name, moment in _moments(model, optimizer).items() if name in facts
        }
    load_tensors(path, tensors)


def _newest_good(folder: Path) -> Path | None:
    for path in folders(folder):
        problem = _verify(path)
        if not problem:
            return path
        print(
            printable(f"warning: checkpoint {path} is damaged ({problem}); trying the one before"),
            file=sys.stderr,
        )
    return None


def load_weights(path: Path, model: nn.Module) -> None:
    """The weights alone of the checkpoint `path`, into `model`; UserError if it is damaged or none."""
    problem = f"there are {sorted(p.name for p in path.parent.glob('step-*'))}"
    if path.exists():
        problem = _verify(path)
    if problem:
        raise UserError(f"checkpoint {path} cannot be used: {problem}")
    _load(path, model)


def newest(folder: Path) -> State | None:
    """State of the newest checkpoint that verifies, without loading its tensors."""
    return next((_state(path) for path in folders(folder) if not _verify(path)), None)


def records(folder: Path, step: int) -> dict[str, str]:
    """The texts of the records that the checkpoint of `step` in `folder` carries."""
    path = folder / f"step-{step:08d}"
    return {
        name: (path / name).read_text(encoding="utf-8")
        for name in RECORDS
        if (path / name).exists()
    }


def _state(path: Path) -> State:
    told = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return State(**told)


def folders(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first; only whole ones ever get such a name."""
    return sorted(folder.glob(_NAME), reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def _verify(path: Path, read: bool = True) -> str:
    """What is wrong with a checkpoint; empty if nothing. Without `read`, sizes are compared and
    sums are not.
    """
    try:
        sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in sorted({"state.json", *sums}):
            if Path(name).name != name:  # only files of the checkpoint itself are opened
                return f"{MANIFEST} names {name!r}, outside of the checkpoint"
            if name not in sums or not (path / name).exists():
                return f"{name} is missing"
            same = (path / name).stat().st_size == sums[name]["bytes"]
            if not same or (read and _sha256(path / name) != sums[name]["sha256"]):
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} has changed since it was written"
    return ""


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state, one flat dictionary: `<parameter>/<exp_avg | exp_avg_sq | step>`."""
    return {
        f"{name}/{kind}": moment
        for name, parameter in model.named_parameters()
        for kind, moment in optimizer.state.get(parameter, {}).items()
    }


def _shortage(folder: Path, needed: int) -> str:
    if shortage(folder, needed):
        return _no_room(folder, needed)
    return ""


def _no_room(folder: Path, needed: int) -> str:
    return (
        f"{folder}: the checkpoint cannot be written: {_numbers(folder, needed)}. Those written "
        "before are whole: make room, then run the same command to continue"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shortage(folder: Path, needed: int) -> str:
    """Needed and free, where the disk of `folder`, which need not be there yet, lacks room for
    tensors of `needed` bytes; else empty.
    """
    if _free(folder) < SPARE * needed:
        return _numbers(folder, needed)
    return ""


def _numbers(folder: Path, needed: int) -> str:
    """Needed and free, in words."""
    return f"{SPARE * needed / 2**20:,.1f} MiB needed, {_free(folder) / 2**20:,.1f} MiB free"


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
