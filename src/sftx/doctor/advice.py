"""What the figures mean for training: how large a model fits, and settings to try."""

from __future__ import annotations

from collections.abc import Sequence

from sftx.doctor.check import Check

ALL_WEIGHTS, LORA_CPU, LORA_GPU, FOUR_BITS = 16.0, 4.4, 2.4, 0.9
"""Bytes a weight: of training all (weights, gradients and two means in float32); of a LoRA over a
base in float32, in bf16, and in 4 bits, a few per cent for the adapter included.
"""
SHARE = 0.7
"""Of the memory, for weights and what belongs to them; the rest is for activations."""
FASTER = 1.5
"""How much faster bf16 must be on a CPU to be worth its rounding."""


def verdict(checks: Sequence[Check], has_bitsandbytes: bool) -> list[str]:
    """Lines that end what `sftx doctor` says; settings stand as they are written."""
    found = {f"{check.group} {check.name}": check for check in checks}
    problems = [check for check in checks if check.state == "problem"]
    lines = [f"not ready: {check.name}: {check.found}" for check in problems]
    gpus = [check for check in checks if check.name.startswith("GPU ") and "free" in check.figures]
    lines += _sizes(found, gpus, has_bitsandbytes)
    lines += _precision(found, gpus)
    if len(gpus) > 1:
        lines.append(f"all {len(gpus)} GPUs: sftx train run.yaml nproc=gpu")
    lines.append(
        "`sftx init` writes a run.yaml for a model and data; `sftx plan` says what it takes"
    )
    return lines


def _sizes(found: dict[str, Check], gpus: Sequence[Check], has_bitsandbytes: bool) -> list[str]:
    on_gpu = bool(gpus)
    memory = min((gpu.figures["free"] for gpu in gpus), default=0.0)
    if not on_gpu and "machine memory" in found:
        memory = found["machine memory"].figures.get("free", 0.0)
    if not memory:
        return []
    usable = SHARE * memory
    base = LORA_GPU if on_gpu else LORA_CPU
    said = (
        f"all weights of models up to about {_count(usable / ALL_WEIGHTS)}; with adapter=lora up "
        f"to about {_count(usable / base)}"
    )
    if on_gpu and has_bitsandbytes:
        said += f", with adapter.quantize=nf4 too, {_count(usable / FOUR_BITS)}"
    return [f"fits: {said} parameters" + (" on each GPU" if on_gpu else "")]


def _precision(found: dict[str, Check], gpus: Sequence[Check]) -> list[str]:
    if gpus:
        if all(gpu.figures.get("bf16") for gpu in gpus):
            return ["try: runtime.precision=auto (bf16)"]
        return ["try: runtime.precision=fp32: a GPU here has no bf16"]
    fp32 = found.get("compute matmul fp32")
    bf16 = found.get("compute matmul bf16")
    if fp32 is None or bf16 is None or not fp32.figures or not bf16.figures:
        return []
    ratio = bf16.figures["flops"] / fp32.figures["flops"]
    if ratio >= FASTER:
        return [f"try: runtime.precision=bf16: products are {ratio:.1f} times as fast as in fp32"]
    return [f"try: runtime.precision=fp32: bf16 is {ratio:.1f} times as fast on this processor"]


def _count(parameters: float) -> str:
    """`135 M`, `1.7 B`."""
    if parameters < 1e9:
        return f"{parameters / 1e6:,.0f} M"
    return f"{parameters / 1e9:,.1f} B" if parameters < 1e10 else f"{parameters / 1e9:,.0f} B"
