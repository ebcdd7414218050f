"""What recurrent layers compute where their kernels are not installed, in a faster way.

transformers then takes plain functions of its own, which are correct but slow: see `OURS`. Ours
stand in their place while sftx computes; what is measured against is always transformers' own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from sftx.model.scan import selective_scan


def causal_conv(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Each channel of `hidden_states` [n, C, T] with the taps before it, `weight` [C, K]: K products
    instead of torch's convolution in C groups, which takes them one by one on a CPU.

    Raises:
        ValueError: borders of segments are given; this does not keep them.
    """
    if cu_seqlens is not None or seq_idx is not None:
        raise ValueError("without its kernel the convolution cannot keep packed segments apart")
    tokens = hidden_states.shape[-1]
    taps = weight.shape[-1]
    seen = nn.functional.pad(hidden_states.to(weight.dtype), (taps - 1, 0))
    out = seen[..., :tokens] * weight[:, :1]
    for tap in range(1, taps):
        out = out + seen[..., tap : tap + tokens] * weight[:, tap : tap + 1]
    if bias is not None:
        out = out + bias[:, None]
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(hidden_states.dtype)


OURS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv,
    "mamba_selective_scan": selective_scan,
}
"""By the name of the function in transformers' modules."""
KERNEL = "is_new_implementation"
"""The name, in such a wrapper, of the variable that says whether it has found a kernel."""
Functions = dict[tuple[str, str], Any]
"""By module and name."""
_replaced: Functions = {}
"""The functions of transformers in whose place ours stand."""


def use_fallbacks(model: nn.Module) -> None:
    """Let the layers of `model` compute by `OURS`, where they have no kernels."""
    for place, own in _wrapped_functions(model).items():
        if place[1] in OURS and not _has_kernel(own):
            _replaced[place] = own
    _use_ours()


@contextmanager
def own_fallbacks() -> Iterator[None]:
    """Inside, models compute as transformers does: what is measured must not measure itself."""
    _put(_replaced)
    try:
        yield
    finally:
        _use_ours()


@contextmanager
def without_kernels(model: nn.Module) -> Iterator[bool]:
    """Inside, the layers of `model` compute by transformers' plain functions, which take float64 and
    the CPU too; gives whether any of them has a kernel.
    """
    found = _wrapped_functions(model).items()
    kernels = {place: own for place, own in found if _has_kernel(own)}
    _put({place: own.__wrapped__ for place, own in kernels.items()})
    try:
        yield bool(kernels)
    finally:
        _put(kernels)


def _use_ours() -> None:
    _put({place: OURS[place[1]] for place in _replaced})


def _put(functions: Functions) -> None:
    for (module, name), function in functions.items():
        setattr(sys.modules[module], name, function)


def _wrapped_functions(model: nn.Module) -> Functions:
    """The functions of its layers that transformers would replace by kernels."""
    found: Functions = {}
    for module in {type(part).__module__ for part in model.modules()}:
        for name, value in vars(sys.modules[module]).items():
            if isinstance(value, FunctionType) and KERNEL in value.__code__.co_freevars:
                found[module, name] = value
    return found


def _has_kernel(function: Any) -> bool:
    """Whether the wrapper that transformers puts around a function of its own has found a kernel."""
    place = function.__code__.co_freevars.index(KERNEL)
    return function.__closure__[place].cell_contents
