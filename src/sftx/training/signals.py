"""Signals ask a run to stop; it stops at the next step boundary, saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from sftx import distributed
from sftx.types import Ended

EXIT_STOPPED = 75  # EX_TEMPFAIL: try again later
STOPPING = "\nstopping after this step; again = quit without saving\n"
NOTHING_TO_SAVE = (
    "stopped by signal {} before a step was taken: nothing to save. Run the same command to go on."
)


class Stopped(Ended):
    """The run was asked to stop and saved its state; exit code 75, run the same command to
    continue.
    """

    exit_code = EXIT_STOPPED


class Diverged(Ended):
    """Loss or gradients were not finite for too many steps in a row; exit code 3."""

    exit_code = 3


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1. A second SIGINT quits at once: what is saved stays whole."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at_once = False  # while there is nothing to save, the run ends where it stands

    def __call__(self) -> bool:
        """Whether a stop was asked for, on any rank; every rank must ask equally often."""
        return self.or_save(False)[0]

    def or_save(self, due: bool) -> tuple[bool, bool]:
        """Whether a stop was asked for, and whether to save now because `due` is true, on any rank.

        One question answers both, so that the ranks wait for each other once.
        """
        signal_of_all, save = divmod(distributed.all_reduce_max(2 * (self.signal or 0) + due), 2)
        # One that has come meanwhile is for the next time.
        self.signal = signal_of_all or self.signal
        return signal_of_all != 0, save == 1

    def set(self, number: int, _: FrameType | None) -> None:
        """The signal handler."""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.at_once:
            raise Stopped(NOTHING_TO_SAVE.format(number))
        if number == signal.SIGINT and distributed.is_main():
            # Print may be in the middle of another line, and must not be entered twice.
            os.write(2, STOPPING.encode())


class SaveClock:
    """Says when so many `minutes` have passed since the last save; 0 = never."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """A state was saved just now."""
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save; the main rank says so for all."""
        is_late = time.monotonic() - self.saved >= self.seconds
        return distributed.is_main() and self.seconds > 0 and is_late


@contextmanager
def listening() -> Generator[StopFlag]:
    """Catch the signals inside; handlers can only be set from the main thread, elsewhere the flag
    stays down.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, flag.set) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
