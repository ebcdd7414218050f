"""Base classes of data pipelines, their registry, and minibatches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers.tokenization_utils_base import BatchEncoding

from sftx.compat.trlx.registry import Registry
from sftx.compat.trlx.utils import logging

_DATAPIPELINE = Registry("train.pipeline")
register_datapipeline = _DATAPIPELINE.register
logger = logging.get_logger(__name__)


@register_datapipeline
class BasePipeline(Dataset):
    """A data set that makes its own loader; subclasses give `__getitem__`, `__len__` and
    `create_loader`.
    """

    def __init__(self, path: str = "dataset") -> None:
        super().__init__()
        self.path = path


class BaseRolloutStore(Dataset):
    """A list of training elements, `history`; subclasses may give `create_loader`."""

    def __init__(self, capacity: int = -1) -> None:
        self.history: list[Any] = []
        self.capacity = capacity

    def push(self, exps: Iterable[Any]) -> None:
        """Append elements."""
        self.history = [*self.history, *exps]

    def __getitem__(self, index: int) -> Any:
        return self.history[index]

    def __len__(self) -> int:
        return len(self.history)


class MiniBatchIterator:
    """Cuts each batch of a loader into at most `num_mb` minibatches of `mb_size` elements; none is
    empty.

    A last batch that is too small gives fewer or shorter minibatches, with a warning.
    """

    def __init__(self, data_loader: Iterable[Any], mb_size: int, num_mb: int) -> None:
        self.data_loader = data_loader
        self.data_loader_iter: Iterator[Any] = iter(data_loader)
        self.mb_size = mb_size
        self.num_mb = num_mb

    def __iter__(self) -> MiniBatchIterator:
        return self

    def __next__(self) -> list[Any]:
        batch = next(self.data_loader_iter)
        columns = dict(vars(batch)) if is_dataclass(batch) else dict(batch)
        minibatches = []
        for start in range(0, self.num_mb * self.mb_size, self.mb_size):
            part = {key: value[start : start + self.mb_size] for key, value in columns.items()}
            sizes = {len(value) for value in part.values()}
            if self.num_mb > 1 and min(sizes) < self.mb_size:
                logger.warning(
                    "a minibatch has %d elements instead of %d: the batch is small",
                    min(sizes),
                    self.mb_size,
                )
            if min(sizes) == 0:
                break
            if isinstance(batch, BatchEncoding):
                minibatches.append(BatchEncoding(part))
            else:
                minibatches.append(type(batch)(**part) if is_dataclass(batch) else part)
        if not minibatches:
            raise StopIteration
        return minibatches
