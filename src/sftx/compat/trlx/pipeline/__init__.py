"""Base classes of data pipelines, their registry, and minibatches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import Dataset

from sftx.compat.trlx.names import Registry

_DATAPIPELINE = Registry("train.pipeline")
register_datapipeline = _DATAPIPELINE.register


@register_datapipeline
class BasePipeline(Dataset[Any]):
    """A data set; subclasses give `__getitem__`, `__len__` and `create_loader`."""

    def __init__(self, path: str = "dataset") -> None:
        super().__init__()
        self.path = path


class BaseRolloutStore(Dataset[Any]):
    """A list of training elements, `history`; subclasses may give `create_loader`."""

    def __init__(self, capacity: int = -1) -> None:
        self.history: list[Any] = []
        self.capacity = capacity

    def push(self, exps: Iterable[Any]) -> None:
        """Append elements."""
        self.history.extend(exps)

    def __getitem__(self, index: int) -> Any:
        return self.history[index]

    def __len__(self) -> int:
        return len(self.history)


class MiniBatchIterator(Iterator[list[Any]]):
    """Cuts each batch of a loader into at most `num_mb` minibatches of `mb_size` elements.

    None is empty: a last batch that is too small gives fewer or shorter ones.
    """

    def __init__(self, data_loader: Iterable[Any], mb_size: int, num_mb: int) -> None:
        self.batches = iter(data_loader)
        self.mb_size = mb_size
        self.num_mb = num_mb

    def __next__(self) -> list[Any]:
        batch = next(self.batches)
        size = min(len(column) for column in batch.values())
        minibatches: list[Any] = []
        for start in range(0, min(size, self.num_mb * self.mb_size), self.mb_size):
            part = {key: column[start : start + self.mb_size] for key, column in batch.items()}
            minibatches.append(type(batch)(part))
        return minibatches
