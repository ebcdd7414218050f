"""What recurrent layers compute where their kernels are not installed, in a faster way.

transformers then takes plain functions of its own, which are correct but slow: see `OURS`. Ours
stand in their place while sftx computes; what is measured against is always transformers' own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
_replaced: dict[tuple[str, str], Callable[..., Any]] = {}
"""By module and name, the functions of transformers in whose place ours stand."""


def use_fallbacks(model: nn.Module) -> None:
    """Let the layers of `model` compute by `OURS`, where they have no kernels."""
    for module in {type(part).__module__ for part in model.modules()}:
        for name, ours in OURS.items():
            own = getattr(sys.modules[module], name, None)
            if own is not None and _falls_back(own):
                _replaced[module, name] = own
                setattr(sys.modules[module], name, ours)


@contextmanager
def own_fallbacks() -> Iterator[None]:
    """Inside, models compute as transformers does: what is measured must not measure itself."""
    for (module, name), own in _replaced.items():
        setattr(sys.modules[module], name, own)
    try:
        yield
    finally:
        for module, name in _replaced:
            setattr(sys.modules[module], name, OURS[name])


def _falls_back(function: Any) -> bool:
    """Whether the wrapper that transformers puts around a function of its own has found no kernel."""
    code = function.__code__
    cells = function.__closure__ or ()
    found = dict(zip(code.co_freevars, cells, strict=True)).get("is_new_implementation")
    return found is not None and not found.cell_contents
