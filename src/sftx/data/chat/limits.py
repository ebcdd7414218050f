"""The limits of templates: how long one may render, and how much memory it may take.

They cost ordinary rendering nothing: a watchdog thread interrupts the series of small operations
that most templates are. What it cannot interrupt is one large operation (the text of a list that
holds itself many times over). For these the system refuses memory beyond `MEMORY` while templates
run, and ends the process, which shows its stacks, after `LAST` seconds. Such limits are of the
whole process: they act only in processes of our own (`limit_this_process`), never in one that calls
the library and does other things beside it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from jinja2.exceptions import TemplateError

SECONDS = 10.0  # of processor time: longest rendering of one text
LAST = 60.0  # seconds of processor time in one operation, after which the process is ended
MEMORY = 1 << 30  # bytes by which the process may grow during one rendering
TOO_LATE = f"it ran longer than {SECONDS:g} s of processor time"
TOO_LARGE = f"it took more than {MEMORY >> 20:,} MiB of memory"
_own_process = False


def limit_this_process() -> None:
    """Say that this process is ours: templates run under limits of memory and time that act on all
    of it.
    """
    global _own_process
    _own_process = True


class LimitError(TemplateError):
    """A template ran for too long or made too much text."""


class _Interruption(LimitError):
    """Raised by the watchdog inside the rendering thread, where it may arrive outside of any
    `except`.
    """

    def __init__(self) -> None:
        super().__init__("it ran for too long or took too much memory")


def deadline() -> AbstractContextManager[None]:
    """What holds the limits of one rendering, where this thread is `watched`."""
    watch = _local.watch
    return watch.deadline() if watch else nullcontext()


class _Watch(threading.Thread):
    """Looks every few milliseconds whether the current rendering is over its limits, and interrupts
    it if so.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="sftx-template-watch")
        self.guard = threading.Lock()
        self.done = threading.Event()
        self.target = threading.get_ident()
        self.started: float | None = None
        self.fired = False
        self.reason = ""

    def spent(self) -> float:
        """Seconds of processor time of the rendering thread.

        Those of the whole process where the system does not tell threads apart.
        """
        if not hasattr(time, "pthread_getcpuclockid"):
            return time.process_time()
        return time.clock_gettime(time.pthread_getcpuclockid(self.target))

    def run(self) -> None:
        seen = None
        memory = 0
        began = 0.0
        while not self.done.wait(0.02):
            if _own_process:  # again: no operation has held up this loop for so long
                signal.setitimer(signal.ITIMER_VIRTUAL, LAST)
            with self.guard:
                if self.started is None or self.fired:
                    continue
                if seen != self.started:  # a new rendering since the last look
                    seen = self.started
                    memory = _memory()
                    began = self.spent()
                    continue
                is_late = self.spent() - began > SECONDS
                is_large = _own_process and _memory() - memory > MEMORY
                if is_late or is_large:
                    self.fired = True
                    self.reason = TOO_LATE if is_late else TOO_LARGE
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(self.target), ctypes.py_object(_Interruption)
                    )

    @contextmanager
    def deadline(self) -> Generator[None]:
        with self.guard:
            self.started, self.fired, self.reason = time.monotonic(), False, TOO_LARGE
        try:
            try:
                yield
            finally:
                self._end()
        except (_Interruption, MemoryError):
            raise LimitError(self.reason) from None

    def _end(self) -> None:
        """Nothing is interrupted from here on; an interruption that is still on its way is waited
        for.
        """
        with self.guard:
            fired = self.fired
            self.started = None
            self.fired = False
        if fired and not isinstance(sys.exc_info()[1], _Interruption):
            for _ in range(1000):
                time.sleep(0.001)


class _Local(threading.local):
    """`watch`: the watchdog of this thread, if one is on guard."""

    watch: _Watch | None = None


_local = _Local()


@contextmanager
def watched() -> Generator[None]:
    """Inside, every `run_template` of this thread is interrupted when it runs too long or, in a
    process of our own, takes too much memory.
    """
    if _local.watch is not None:
        yield
        return
    watch = _local.watch = _Watch()
    watch.start()
    try:
        with _process_limits() if _own_process else nullcontext():
            yield
    finally:
        watch.done.set()
        watch.join()
        if _own_process:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _local.watch = None


@contextmanager
def _process_limits() -> Generator[None]:
    """Inside, the process gets no more than `MEMORY` further bytes, and is ended by an operation
    longer than `LAST`.
    """
    import resource  # absent on Windows

    signal.setitimer(signal.ITIMER_VIRTUAL, LAST)
    if sys.__stderr__ is not None:  # the stacks, and then what the signal does by default
        faulthandler.register(signal.SIGVTALRM, sys.__stderr__, chain=True)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    soft, hard = before
    limit = _memory(of_data=True) + MEMORY
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _memory(of_data: bool = False) -> int:
    """Bytes of this process that are in memory, or that it has asked for (`of_data`).

    0 where the system does not tell.
    """
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    pages = statm.read_text().split()[5 if of_data else 1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
