"""One step under PyTorch's profiler: where its time goes, and the kernels that take most of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

TOP = 15
"""Kernels that are listed."""
LOSS, OPTIMISER = "sftx loss", "sftx optimiser"
KINDS = {
    "attention": ("flash", "fmha", "attention", "varlen"),
    "gemm": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "aten::mm", "aten::addmm", "aten::bmm"),
    "communication": ("nccl", "gloo", "all_gather", "reduce_scatter", "all_reduce"),
    "copies": ("memcpy", "memset", "aten::copy_"),
}
"""What the names of kernels (on a CPU: of operations) hold, in lower case; the first kind that fits. The rest
is norms, activations and other work element by element.
"""


@contextmanager
def step_profile(number: int, found: dict[str, Any]) -> Iterator[None]:
    """Profile the `number`-th (1-based) step of the run of sftx inside; `found` gets the figures."""
    from sftx.model import pack_loss
    from sftx.training import loop

    own, taken = loop.train_step, 0

    def watched(*given: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken != number:
            return own(*given)
        with profile(found), _named(given[1]):
            return own(*given)

    loss_names = ("cross_entropy_sum", "fused_cross_entropy_sum")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "train_step", watched))
        for name in loss_names:
            marked = _marked(LOSS, getattr(pack_loss, name))
            stack.enter_context(mock.patch.object(pack_loss, name, marked))
        yield


@contextmanager
def _named(optimizer: Any) -> Iterator[None]:
    with mock.patch.object(optimizer, "step", _marked(OPTIMISER, optimizer.step)):
        yield


def _marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def inside(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return inside


@contextmanager
def profile(found: dict[str, Any]) -> Iterator[None]:
    """Profile what is inside, from an idle device to an idle device."""
    import torch

    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as watch:
        began = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    found |= shares(list(watch.events() or []), seconds, cuda)


def shares(events: list[Any], seconds: float, cuda: bool) -> dict[str, Any]:
    """Shares of the step's time by kind, and the kernels that take most of it.

    On a GPU by kernels, the time in which none ran being idle; on a CPU by operations' own time. The
    whole of what loss and optimiser launch counts for them, whatever it is; the backward pass through
    the head is in the loss, which makes its gradients at once.
    """
    by_kind: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    count: Counter[str] = Counter()
    spans: list[tuple[float, float]] = []
    for event in events:
        on_device = "CUDA" in str(event.device_type)
        if on_device != cuda or event.is_user_annotation or event.name in (LOSS, OPTIMISER):
            continue
        span = event.time_range
        spent = span.elapsed_us() if cuda else event.self_cpu_time_total
        by_name[event.name] += spent
        count[event.name] += 1
        spans.append((span.start, span.end))
        by_kind[_kind(event.name) if cuda else _owner(event) or _kind(event.name)] += spent
    if cuda:
        _move_to_owners(events, by_kind)
    total = seconds * 1e6
    busy = _covered(spans) if cuda else sum(by_kind.values())
    kernels = [
        {"name": name[:120], "ms": round(spent / 1e3, 3), "calls": count[name]}
        for name, spent in by_name.most_common(TOP)
    ]
    parts = {kind: round(spent / total, 4) for kind, spent in by_kind.most_common()}
    parts["idle"] = round(max(1 - busy / total, 0.0), 4)
    return {"step_seconds": seconds, "shares": parts, "top": kernels}


def _move_to_owners(events: list[Any], by_kind: Counter[str]) -> None:
    """Kernels that were launched inside loss or optimiser count for these."""
    for event in events:
        owner = _owner(event)
        for kernel in event.kernels if owner else []:
            if kernel.name in (LOSS, OPTIMISER):  # the span of the part, not work
                continue
            by_kind[_kind(kernel.name)] -= kernel.duration
            by_kind[str(owner)] += kernel.duration


def _owner(event: Any) -> str | None:
    """The part of a step that an operation was called in; None where it is none of those marked."""
    while event is not None:
        if event.name in (LOSS, OPTIMISER):
            return event.name.removeprefix("sftx ")
        event = event.cpu_parent
    return None


def _kind(name: str) -> str:
    lower = name.lower()
    for kind, parts in KINDS.items():
        if any(part in lower for part in parts):
            return kind
    return "norms and elementwise"


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(end - max(start, until), 0.0)
        until = max(until, end)
    return covered
