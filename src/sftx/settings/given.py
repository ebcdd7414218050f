"""What may be given in Python where settings of a file are text and lists."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

Text = str | os.PathLike[str]


class Frame(Protocol):
    """A DataFrame of pandas."""

    def itertuples(self) -> Any:
        """Its rows."""
        ...


class ArrowTable(Protocol):
    """A data set of the `datasets` library."""

    def __iter__(self) -> Iterator[Any]:
        """Its rows."""
        ...

    @property
    def features(self) -> Any:
        """Its columns."""
        ...


Rows = Sequence[Any] | Iterator[Any] | Frame | ArrowTable
"""Rows held in memory: texts, [prompt, output, ...] lists or dictionaries."""
