"""What a model remembers from one forward pass to the next, and how to make it forget.

Some rotary embeddings keep the frequencies of the longest example so far: what an example gives
would depend on those before it. Put back before every example, such a model computes each as if it
were the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Names = frozenset[tuple[str, str]]
"""(class of a module, name of its buffer or attribute)."""


class ForwardState:
    """The buffers and plain attributes of all modules of `model` as they are now; of those in
    `names`, where given.
    """

    def __init__(self, model: nn.Module, names: Names | None = None) -> None:
        self._held: list[tuple[nn.Module, str, Any]] = []
        for module in model.modules():
            for name in (*module._buffers, *vars(module)):
                value = getattr(module, name)
                wanted = names is None or (type(module).__name__, name) in names
                if wanted and name != "training" and _is_plain(value):
                    self._held.append((module, name, _copied(value)))

    def changed(self) -> Names:
        """What is no longer as it was."""
        return frozenset(
            (type(module).__name__, name)
            for module, name, value in self._held
            if not _equal(getattr(module, name), value)
        )

    def put_back(self) -> None:
        """Make everything as it was."""
        for module, name, value in self._held:
            setattr(module, name, _copied(value))


def _is_plain(value: object) -> bool:
    """Numbers, tensors, and None in place of one; not switches and names, which others set between
    two passes.
    """
    if isinstance(value, bool):
        return False
    return value is None or isinstance(value, int | float | torch.Tensor)


def _copied(value: Any) -> Any:
    """A copy that no operation in place reaches."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return value


def _equal(one: object, other: object) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return type(one) is type(other) and one == other
    if one.shape != other.shape:
        return False
    return bool((one == other).all())
