"""GPUs, the speed of products, and whether several GPUs reach each other."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from sftx.doctor.check import Check, gib

if TYPE_CHECKING:
    import torch

SECONDS = 0.7
"""For which each product is repeated, at most."""
REACH_SECONDS = 12
"""After which two processes that do not reach each other are given up."""
CPU_SIZE, GPU_SIZE = 1024, 8192
_REACH = """
import sys, torch, torch.distributed as dist
backend, address, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = torch.device("cpu")
if backend == "nccl":
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
dist.init_process_group(backend, init_method=address, rank=rank, world_size=2)
value = torch.ones(1, device=device)
dist.all_reduce(value)
dist.barrier()  # nobody leaves while the other still reads
dist.destroy_process_group()
sys.exit(0 if value.item() == 2 else 3)
"""


def torch_module() -> tuple[ModuleType | None, str]:
    """PyTorch, or why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return None, str(error)
    return torch, ""


def gpus() -> Iterator[Check]:
    """Each GPU, or why there is none."""
    import torch

    if not torch.cuda.is_available():
        yield Check("compute", "GPU", _no_gpu(), figures={"gpus": 0})
        return
    for number in range(torch.cuda.device_count()):
        yield _gpu(number)
    count = torch.cuda.device_count()
    if count == 1:
        yield Check("compute", "NCCL", "not tried: there is one GPU")
    else:
        yield reach("nccl", f"{count} GPUs")


def _no_gpu() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "none; this build of PyTorch is for the CPU"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"none that PyTorch can use: {str(error).strip().partition(chr(10))[0]}"
    return "none that PyTorch sees"


def _gpu(number: int) -> Check:
    import torch

    properties = torch.cuda.get_device_properties(number)
    capability = properties.major + properties.minor / 10
    try:
        left, total = torch.cuda.mem_get_info(number)
    except RuntimeError as error:
        advice = "look at nvidia-smi: another program may hold all of it, or the driver be broken"
        found = f"{properties.name}: {str(error).partition(chr(10))[0]}"
        return Check("compute", f"GPU {number}", found, "problem", advice)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    said = (
        f"{properties.name}, {gib(left)} of {gib(total)} free, capability "
        f"{properties.major}.{properties.minor}, {'with' if bf16 else 'without'} bf16"
    )
    figures = {"free": float(left), "total": float(total), "capability": capability}
    figures["bf16"] = float(bf16)
    if left < total / 2:
        advice = "another program holds more than half of its memory; see nvidia-smi"
        return Check("compute", f"GPU {number}", said, "note", advice, figures)
    return Check("compute", f"GPU {number}", said, figures=figures)


def reach(backend: str, name: str) -> Check:
    """Whether two processes can add up a number: all_reduce by `backend`."""
    import tempfile

    import torch

    if not torch.distributed.is_available():
        return Check("compute", backend.upper(), "this build of PyTorch has no torch.distributed")
    with tempfile.NamedTemporaryFile(prefix="sftx-doctor-") as file:
        address = f"file://{file.name}.store"
        began = time.perf_counter()
        problem = _reached(backend, address)
        seconds = time.perf_counter() - began
    if problem:
        advice = "run with NCCL_DEBUG=INFO to see why; one GPU alone works without"
        return Check("compute", backend.upper(), f"{name}: {problem}", "problem", advice)
    return Check("compute", backend.upper(), f"{name}: all_reduce works ({seconds:.1f} s to start)")


def _reached(backend: str, address: str) -> str:
    """What went wrong; empty where nothing did."""
    command = [sys.executable, "-c", _REACH, backend, address]
    processes = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    until = time.monotonic() + REACH_SECONDS
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(until - time.monotonic(), 0.1))
            if process.returncode:
                return errors.strip().rpartition("\n")[2] or f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        return f"no answer within {REACH_SECONDS} s"
    finally:
        for process in processes:
            process.kill()
    return ""


def products() -> Iterator[Check]:
    """The speed of matrix products in fp32 and in bf16, on the device and with the switches that
    training takes.
    """
    import torch

    from sftx.model.runtime import machine
    from sftx.settings.schema import Runtime

    with machine(Runtime()) as here:
        size = GPU_SIZE if here.device.type == "cuda" else CPU_SIZE
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            yield _product(name, dtype, here.device, size)


def _product(name: str, dtype: torch.dtype, device: torch.device, size: int) -> Check:
    try:
        speed = _speed(dtype, device, size)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        return Check("compute", f"matmul {name}", f"fails: {reason}", "note")
    said = f"{speed / 1e12:,.2f} TFLOP/s on the {device.type.replace('cuda', 'gpu').upper()}"
    return Check("compute", f"matmul {name}", said, figures={"flops": speed})


def _speed(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """FLOP/s, the best of what fits into the time."""
    import torch

    one = torch.randn(size, size, device=device).to(dtype)
    other = torch.randn(size, size, device=device).to(dtype)

    def seconds() -> float:
        began = time.perf_counter()
        torch.matmul(one, other)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    until = time.perf_counter() + SECONDS
    best = seconds()
    while time.perf_counter() < until:
        best = min(best, seconds())
    return 2 * size**3 / best
