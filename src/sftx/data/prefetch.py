"""Preparing what comes next on another thread, so that the device never waits for data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def prefetched(
    keys: Iterable[Key], load: Callable[[Key], Value], depth: int = 2
) -> Iterator[tuple[Key, Value]]:
    """`(key, load(key))` for every key, in order; up to `depth` are loaded ahead.

    An exception in `load` is raised here, when its key's turn comes.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="sftx-prefetch") as pool:
        waiting: deque[tuple[Key, Future[Value]]] = deque()
        try:
            for key in keys:
                waiting.append((key, pool.submit(load, key)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
