"""A pack as one batch: its segments side by side, padded on the right to the longest.

Exact for a causal model, whatever its layers do: padding stands behind all that counts, positions
begin at 0 in every row, and no layer has to be told where a segment ends. The start-up checks
measure that it is so. Padding costs time: `sftx.data.pack.like_lengths` makes packs in which there
is little of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the tokens of a pack of n segments, the longest of L tokens, stand in a batch."""

    rows: Tensor  # int64[n, L]: which token of the pack; behind its end a row repeats its last one
    places: Tensor  # int64[T]: where each token of the pack stands, counted row by row

    def flat(self, found: Tensor) -> Tensor:
        """What a model gives for the batch, [n, L, C] or [n * L, C], for the pack: [T, C]."""
        return found.reshape(-1, found.shape[-1]).index_select(0, self.places)

    def padded(self, values: Tensor) -> Tensor:
        """A number of each token of the pack, [T], where it stands in the batch, [n * L]; 0 for
        padding.
        """
        return values.new_zeros(self.rows.numel()).index_copy(0, self.places, values)


def as_batch(cu_seqlens_cpu: Tensor, device: torch.device) -> Batch:
    """The batch of a pack whose segments begin and end at `cu_seqlens_cpu`, int32[n + 1]."""
    # As numbers: the rehearsal of memory has tensors without contents.
    bounds = np.array(cu_seqlens_cpu.tolist(), np.int64)
    lengths = np.diff(bounds)[:, None]
    column = np.arange(lengths.max())
    rows = bounds[:-1, None] + np.minimum(column, lengths - 1)
    places = np.flatnonzero(column < lengths)
    found: list[Tensor] = []
    for array in (rows, places):
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        found.append(tensor.to(device, non_blocking=True))
    return Batch(*found)
