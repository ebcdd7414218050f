"""Small helpers that scripts import from trlx.utils."""

from __future__ import annotations

import math
import os
import random
from typing import Any

import numpy as np
import torch


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch, differently on every rank."""
    seed += int(os.environ.get("RANK", "0"))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def significant(x: Any, ndigits: int = 2) -> Any:
    """A number rounded to `ndigits` after its first significant digit; anything else as it is."""
    x = x.item() if isinstance(x, torch.Tensor) and x.numel() == 1 else x
    if not isinstance(x, int | float) or x == 0 or not math.isfinite(x):
        return x
    return round(x, ndigits - math.floor(math.log10(abs(x))))
