"""A few places that stand for many."""

from __future__ import annotations

import numpy as np


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the places 0 to `count` - 1, evenly spaced, the first and the last among
    them.
    """
    places = np.linspace(0, max(count - 1, 0), min(count, most))
    return np.unique(places.astype(np.int64)).tolist()
