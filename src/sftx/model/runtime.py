"""The machine: device, precision, threads, and the CPU settings that PyTorch leaves at slow
defaults.

`machine(runtime)` applies them for the duration of a run and puts them back afterwards.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from sftx import distributed
from sftx.model import host_memory
from sftx.model.threads import default_threads
from sftx.settings.schema import Runtime
from sftx.types import UserError

# glibc's mallopt parameters (malloc.h) and their documented defaults.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_DEFAULTS = {_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 128 << 10, _M_TOP_PAD: 128 << 10}
CUBLAS_WORKSPACE = 32 << 20
"""Bytes; PyTorch's default on Hopper (CUBLAS_WORKSPACE_CONFIG in its notes on CUDA), 8 MiB on other
GPUs.
"""
# A property that its module makes for itself.
_FILLING: Any = import_module("torch.utils.deterministic")
_KEEP_MEMORY = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and in what precision a run computes."""

    device: torch.device
    precision: torch.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in `precision` over fp32 weights."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def memory(self) -> int:
        """Bytes: peak allocated on a GPU, else peak of this process' resident memory, since
        `forget_peak`.
        """
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        return host_memory.resident_peak()

    def forget_peak(self) -> None:
        """Begin a new peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            host_memory.forget_resident_peak()

    def available_memory(self) -> tuple[int, int]:
        """Bytes: (all that this process may take, what it has reserved and cannot use for a model).

        Of several ranks the least and the most: they must choose alike.
        """
        on_gpu = self.device.type == "cuda"
        reserved = CUBLAS_WORKSPACE if on_gpu else host_memory.resident()
        available = (
            torch.cuda.mem_get_info(self.device)[0] if on_gpu else reserved + host_memory.free()
        )
        return -distributed.all_reduce_max(-available), distributed.all_reduce_max(reserved)

    def free_memory(self) -> int:
        """Bytes that new tensors may still take; of several ranks the least."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            reserved = torch.cuda.memory_reserved(self.device)
            free += reserved - torch.cuda.memory_allocated(self.device)
        else:
            free = host_memory.free()
        return -distributed.all_reduce_max(-free)


def name_of(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def machine(runtime: Runtime) -> Iterator[Machine]:
    """Choose the device and apply the settings of `runtime`; everything is put back on leaving."""
    device = _choose_device(runtime)
    half = runtime.precision == "bf16" or (runtime.precision == "auto" and device.type == "cuda")
    threads = torch.get_num_threads()
    matmul = torch.get_float32_matmul_precision()
    stack = ExitStack()
    if runtime.deterministic:
        stack.enter_context(deterministic())
    try:
        if device.type == "cpu":
            torch.set_num_threads(default_threads(runtime))
            _mallopt(_KEEP_MEMORY)
            # oneDNN, and PyTorch once more in front of it, keep code for 1,024 shapes otherwise: up
            # to 0.7 and 0.4 GiB. They look here once, at their first product.
            for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
                os.environ.setdefault(name, "100")
            _fast_exact_matmul()
        with stack:
            yield Machine(device, torch.bfloat16 if half else torch.float32)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)
        if device.type == "cpu":
            _mallopt(_DEFAULTS)


@contextmanager
def deterministic() -> Iterator[None]:
    """Let every operation add up in one order; UserError where one has no such form.

    Flash attention's backward pass obeys the same switch as PyTorch's own operations. Compiled
    layers choose their kernels without timing them.
    """
    from torch._inductor import config as inductor

    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:  # read when CUDA starts
        if torch.cuda.is_initialized():
            raise UserError(
                "runtime.deterministic: CUDA is in use already; set the environment variable "
                "CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"
            )
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    was = (
        torch.are_deterministic_algorithms_enabled(),
        _FILLING.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        inductor.deterministic,
    )
    _set_deterministic(True, False, True, False, True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"runtime.deterministic: {reason}") from error
    finally:
        _set_deterministic(*was)


def _set_deterministic(
    algorithms: bool, fill: bool, cudnn: bool, benchmark: bool, compiled: bool
) -> None:
    from torch._inductor import config as inductor

    torch.use_deterministic_algorithms(algorithms)
    # Nothing here reads memory that was not written: filling it would only cost time.
    _FILLING.fill_uninitialized_memory = fill
    torch.backends.cudnn.deterministic = cudnn
    torch.backends.cudnn.benchmark = benchmark
    inductor.deterministic = compiled


def _choose_device(runtime: Runtime) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if runtime.device == "cuda" and not has_gpu:
        raise UserError("runtime.device: cuda was asked for, but PyTorch sees no CUDA device")
    if not has_gpu or runtime.device == "cpu":
        return torch.device("cpu")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"{distributed.local_size()} processes were started here, but there are "
            f"{torch.cuda.device_count()} GPUs"
        )
    device = torch.device("cuda", distributed.local_rank())
    torch.cuda.set_device(device)
    return device


def _mallopt(settings: dict[int, int]) -> None:
    """Let glibc keep freed memory: otherwise every large tensor is mapped and unmapped anew, page
    by page.
    """
    # Glibc's own.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in settings.items():
            mallopt(parameter, value)


def _fast_exact_matmul() -> None:
    """Route fp32 products to oneDNN where that is as exact: up to twice as fast as MKL on AMD
    processors.

    "medium" allows bf16 inside; processors without AMX have nothing to use it with and stay in
    fp32. Measured, not believed: where the error shows otherwise the setting is taken back.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    error = (a @ b).double() - exact
    if float(error.norm() / exact.norm()) > 2e-6:
        torch.set_float32_matmul_precision("highest")
