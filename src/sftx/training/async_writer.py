"""One piece of work at a time on a thread of its own; what goes wrong there is raised here, at the
next occasion.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Self

from sftx import distributed


class AsyncWriter:
    """Used for writing checkpoints while training goes on.

    A context: its end waits for what is being written. Not after an error among several ranks: the
    write needs all of them, and some may be gone.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None or kind is GeneratorExit:
            self.wait()
        elif self._thread is not None and not distributed.is_joined():
            self._thread.join()

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work` once the work before it is done."""
        self.wait()
        # A daemon: whoever quits at once does not wait for it. What it leaves is a folder with a
        # temporary name.
        self._thread = Thread(target=self._run, args=(work,), daemon=True, name="sftx-checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._error is not None:
            error = self._error
            self._error = None
            raise error

    def wait(self) -> None:
        """Until the work is done; then as `check`."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
