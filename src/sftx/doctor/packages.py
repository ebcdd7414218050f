"""The packages that sftx stands on, and those that it can use besides. Nothing is imported."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from sftx.doctor.check import Check

SUPPORTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", ""),
    "transformers": ("5.17", "6"),
    "peft": ("0.19", ""),
    "accelerate": ("1.5", ""),
    "tokenizers": ("0.22", ""),
    "safetensors": ("0.6", ""),
    "huggingface-hub": ("1.3", "3"),
}
"""The least version, and the first one that is too new."""
OPTIONAL: dict[str, str] = {
    "pyarrow": "Parquet and Arrow files",
    "zstandard": "files that end in .zst",
    "datasets": "data sets of the hub",
    "bitsandbytes": "4-bit bases (adapter.quantize: nf4)",
    "kernels": "attention kernels of the hub",
    "optuna": "sweeps by TPE",
    "rensa": "near duplicates in lint",
    "rouge-score": "the metric rouge_l",
    "sacrebleu": "the metrics bleu and chrf",
    "lm-eval": "standard benchmarks",
    "gguf": "GGUF files",
    "llama-cpp-python": "GGUF files as llama.cpp reads them",
    "tensorboard": "track: tensorboard",
    "wandb": "track: wandb",
    "mlflow": "track: mlflow",
    "trackio": "track: trackio",
    "trl": "preference optimisation and RL after training",
}
"""Packages that add something, and what."""


def needed() -> Iterator[Check]:
    """The versions that sftx stands on, against the range that it takes."""
    for name, (least, too_new) in SUPPORTED.items():
        found = installed(name)
        wanted = f">={least}" + (f",<{too_new}" if too_new else "")
        install = f"pip install '{name}{wanted}'"
        if found is None:
            yield Check("packages", name, "not installed", "problem", install)
        elif _is_older(found, than=least):
            yield Check("packages", name, f"{found} is too old", "problem", install)
        elif too_new and _is_as_new(found, too_new):
            yield Check("packages", name, f"{found} is newer than is known", "problem", install)
        else:
            yield Check("packages", name, f"{found} ({wanted})")


def optional() -> Iterator[Check]:
    """What is there of the packages that add something, and what is not."""
    present = {name: installed(name) for name in OPTIONAL}
    there = [f"{name} {found}" for name, found in present.items() if found]
    absent = [f"{name} ({OPTIONAL[name]})" for name, found in present.items() if not found]
    yield Check("optional", "installed", ", ".join(there) or "none")
    if absent:
        yield Check("optional", "not installed", ", ".join(absent))


def installed(name: str) -> str | None:
    """The version of a package; None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_older(found: str, than: str) -> bool:
    known = _version(found)
    return known is not None and known < Version(than)


def _is_as_new(found: str, as_this: str) -> bool:
    known = _version(found)
    return known is not None and known >= Version(as_this)


def _version(text: str) -> Version | None:
    """None for a build of one's own, whose name says nothing: it is not ours to judge."""
    try:
        return Version(text)
    except InvalidVersion:
        return None
