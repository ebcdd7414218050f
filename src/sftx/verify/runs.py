"""Short runs in the temporary folder: what is continued, shared by two processes, merged, saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sftx.model.host_memory import free
from sftx.model.threads import default_threads
from sftx.settings.schema import Adapter, Batch, Checkpoint, Config, Eval, Optim
from sftx.training.export import Allowed, export
from sftx.training.loop import steps
from sftx.types import Example
from sftx.verify.finding import Finding, compared, does_not_apply
from sftx.verify.oracle import logits_of, plain_model
from sftx.verify.sample import Sample

STEPS = 4
EACH = 2
STOP_AFTER = 2
SECONDS = 900
"""For which two processes may run."""
LOGITS = 1e-5
"""The largest difference of two logits, relative to the largest one, that float32 explains."""
RESUMED = "resumed = uninterrupted"
RANKS = "1 = 2 ranks"
MERGED = "adapter = merged"
SAVED = "saved = loaded"
_BYTES_PER_WEIGHT = 16  # of training all weights: weights, gradients, AdamW's two means


@dataclass(frozen=True, slots=True)
class ShortRun:
    """A run of a few steps, and the model as it was in memory after the last one."""

    config: Config
    model: Any

    @property
    def folder(self) -> Path:
        """Where the run left its model."""
        return Path(self.config.output)


def method_for(config: Config, parameters: int, folder: Path) -> Adapter:
    """What the short runs train: what the settings say, else all weights where memory and disk have
    room for that twice over, else a LoRA.
    """
    if "adapter" in config.model_fields_set:
        return config.adapter.model_copy(update={"quantize": "none", "merge": False})
    disk = os.statvfs(folder)
    room = min(free() // 2, disk.f_bavail * disk.f_frsize // 3)
    if parameters * _BYTES_PER_WEIGHT < room:
        return Adapter()
    return Adapter(method="lora", rank=8)


def settings_of(sample: Sample, adapter: Adapter, name: str) -> Config:
    """The settings of a short run into the folder `name`; nothing that it would only wait for."""
    config = sample.config
    runtime = config.runtime
    fixed = {
        "progress": False,
        "compile": "off",
        # What the machine decides by what is free just now must be the same in all runs.
        "threads": runtime.threads or default_threads(runtime),
        "tokens_per_pack": runtime.tokens_per_pack or 512,
    }
    optim = config.optim.model_dump(exclude_unset=True)
    optim["warmup"] = 0.0
    optim["learning_rate"] = None
    if adapter.method != "none":
        optim["learning_rate"] = 5e-3  # far enough that an adapter shows
    sections = {
        "output": str(sample.folder / name),
        "adapter": adapter,
        "model": config.model.model_copy(update={"save_dtype": "fp32"}),
        "batch": Batch(examples_per_step=EACH, steps=STEPS, shuffle=config.batch.shuffle),
        "optim": Optim(**optim),
        "eval": Eval(),
        "checkpoint": Checkpoint(minutes=0),
        "runtime": runtime.model_copy(update=fixed),
    }
    return config.model_copy(update=sections)


def run_through(config: Config) -> ShortRun:
    """The run without a stop.

    Raises:
        UserError: what is wrong with the data, the model or the memory.
    """
    run = steps(config)
    model = None
    for _ in run:
        model = run.model
    return ShortRun(config, model)


def compare_resumed(straight: ShortRun) -> Finding:
    """Stop the same run after two steps, continue it, and compare records and weights to the bit."""
    output = straight.folder.with_name("resumed")
    config = straight.config.model_copy(update={"output": str(output)})
    first = steps(config)
    for record in first:
        if record.step == STOP_AFTER:
            first.save()
            break
    first.close()
    for _ in steps(config):
        pass
    numbers = _difference_of_records(straight.folder, output)
    numbers["weights"] = _difference_of_weights(straight.folder, output)
    how = (
        f"{STEPS} steps at once; {STOP_AFTER} steps, stopped, continued: losses, gradient norms and "
        f"weights to the bit ({_method(straight.config)})"
    )
    return compared(RESUMED, how, numbers, dict.fromkeys(numbers, 0.0))


def compare_ranks(straight: ShortRun, parameters: int) -> Finding:
    """The same run by two processes that torchrun starts."""
    how = f"{STEPS} steps by one process, and by two that torchrun starts: loss and gradient norm"
    why = _no_two_ranks(straight, parameters)
    if why:
        return does_not_apply(RANKS, how, why)
    output = straight.folder.with_name("two-ranks")
    config = straight.config.model_copy(update={"output": str(output)})
    problem = _run_two_ranks(config)
    if problem:
        return Finding(RANKS, how, "differs", why=problem)
    numbers = _difference_of_records(straight.folder, output)
    limits = {"loss": 1e-4, "gradient norm": 1e-3}
    if config.runtime.precision == "bf16":
        limits = {"loss": 2e-2, "gradient norm": 1e-1}
    return compared(RANKS, how, numbers, limits)


def _no_two_ranks(straight: ShortRun, parameters: int) -> str:
    """Why two processes cannot be tried here; empty where they can."""
    config = straight.config
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 1 and config.runtime.device != "cpu":
        return "there is one GPU, and each process needs its own (runtime.device=cpu tries the CPU)"
    if not torch.distributed.is_available():
        return "this build of PyTorch has no torch.distributed"
    name = _dropout(straight)
    if name:
        return f"the run has dropout ({name}): each process draws its own"
    each = _BYTES_PER_WEIGHT
    if config.adapter.method != "none":
        each = 4
    needed = 2 * parameters * each
    available = free()
    if not gpus and needed > 0.8 * available:
        return f"two copies need {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} are free"
    return ""


def _dropout(straight: ShortRun) -> str:
    """Its name and rate; empty where there is none."""
    of_adapter = straight.config.adapter.dropout
    if of_adapter:
        return f"adapter.dropout {of_adapter:g}"
    for name, rate in straight.model.config.to_dict().items():
        if "drop" in name and isinstance(rate, int | float) and rate > 0:
            return f"{name} {rate:g}"
    return ""


def _run_two_ranks(config: Config) -> str:
    """Run it; what went wrong, or nothing."""
    file = Path(config.output).with_suffix(".yaml")
    file.write_text(config.model_dump_json(exclude_unset=True), encoding="utf-8")
    command = [sys.executable, "-m", "sftx", "train", str(file), "nproc=2"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"the two processes were not done after {SECONDS} s"
    if done.returncode == 0:
        return ""
    _, _, said = done.stderr.strip().rpartition("\n")
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    if errors:
        said = errors[0]
    return f"the two processes ended with code {done.returncode}: {said}"


def compare_saved(run: ShortRun, texts: list[Example]) -> Finding:
    """The model in memory after the last step, against its folder as transformers and peft load it."""
    config = run.config
    how = (
        f"logits after {STEPS} steps in memory; of the folder as transformers loads it, in float32"
    )
    ids = [example.ids.tolist() for example in texts]
    in_memory = logits_of(run.model.eval(), ids)
    loaded = logits_of(_loaded(config), ids)
    numbers = {"logits": _relative(loaded, in_memory)}
    return compared(SAVED, how, numbers, {"logits": LOGITS})


def compare_merged(run: ShortRun, texts: list[Example]) -> Finding:
    """The adapter beside its base as peft loads them, against the folder that `sftx export` writes."""
    config = run.config
    ids = [example.ids.tolist() for example in texts]
    trust = config.model.trust_remote_code
    device = torch.device("cpu")
    target = run.folder.with_name("merged")
    export(run.folder, target, "fp32", allowed=Allowed.of(config))
    merged = logits_of(plain_model(str(target), None, trust, device), ids)
    beside = logits_of(plain_model(config.model.path, str(run.folder), trust, device), ids)
    base = logits_of(plain_model(config.model.path, None, trust, device), ids)
    effect = _relative(beside, base)
    how = (
        "logits of the base with the adapter as peft loads it; of the folder that export merged. "
        f"The adapter moves them by {effect:.1g} of the largest"
    )
    if effect < 100 * LOGITS:
        return does_not_apply(MERGED, how, f"the adapter moves no logit by more than {effect:.0e}")
    numbers = {"logits": _relative(merged, beside)}
    return compared(MERGED, how, numbers, {"logits": LOGITS})


def _loaded(config: Config) -> Any:
    path = config.output
    adapter = None
    if config.adapter.method != "none":
        path = config.model.path
        adapter = config.output
    return plain_model(path, adapter, config.model.trust_remote_code, torch.device("cpu"))


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two logits, relative to the largest one."""
    largest_difference = (one - other).abs().max()
    return float(largest_difference / other.abs().max())


def _method(config: Config) -> str:
    if config.adapter.method == "none":
        return "all weights"
    return f"a {config.adapter.method}"


def _records(folder: Path) -> list[Mapping[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    records = map(json.loads, text.splitlines())
    return [record for record in records if record["step"]]


def _difference_of_records(one: Path, other: Path) -> dict[str, float]:
    """The largest relative difference of a step's loss, and of its gradient norm; infinite where
    the runs have other steps.
    """
    first = _records(one)
    second = _records(other)
    worst = {"loss": 0.0, "gradient norm": 0.0}
    if [record["step"] for record in first] != [record["step"] for record in second]:
        return dict.fromkeys(worst, float("inf"))
    for a, b in zip(first, second, strict=True):
        for name, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
            if a[key] is None or b[key] is None:
                return dict.fromkeys(worst, float("inf"))
            size = max(abs(a[key]), 1e-30)
            apart = abs(a[key] - b[key]) / size
            worst[name] = max(worst[name], apart)
    return worst


def _difference_of_weights(one: Path, other: Path) -> float:
    """The largest difference of any saved weight."""
    worst = 0.0
    for file in sorted(one.glob("*.safetensors")):
        first = load_file(file)
        second = load_file(other / file.name)
        for name, tensor in first.items():
            apart = (tensor - second[name]).abs().max()
            worst = max(worst, float(apart))
    return worst
