"""A share of a source for each epoch: another every time, no row twice before all were shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sftx.types import Int64


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The rows of one source in a circle, of which epoch after epoch takes the next
    `rows_per_epoch`.

    `order`: int64[examples], indices of the examples as they lie on the circle, those of a row
    together. `starts`: int64[rows + 1], where each row begins in `order`. `rows_per_epoch` is a
    real number between 0 and the rows: what one epoch takes too much by rounding, a later one takes
    less.
    """

    order: Int64
    starts: Int64
    rows_per_epoch: float

    def members(self, epoch: int) -> Int64:
        """Indices of the examples that an epoch (from 0 on) shows, ascending."""
        rows = len(self.starts) - 1
        begin = self._position(epoch)
        count = self._position(epoch + 1) - begin
        first = begin % rows
        last = first + count
        found = self.order[self.starts[first] : self.starts[min(last, rows)]]
        if last > rows:  # around the circle
            found = np.concatenate([found, self.order[: self.starts[last - rows]]])
        return np.sort(found)

    def share(self) -> float:
        """The share of its rows that an epoch shows."""
        return self.rows_per_epoch / (len(self.starts) - 1)

    def state(self) -> bytes:
        """All that decides `members`."""
        return (
            self.order.tobytes() + self.starts.tobytes() + np.float64(self.rows_per_epoch).tobytes()
        )

    def _position(self, epoch: int) -> int:
        return int(np.floor(epoch * self.rows_per_epoch + 0.5))
