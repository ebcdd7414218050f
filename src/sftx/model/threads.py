"""How many CPU threads compute: what is asked for, else the available cores, else what is fastest
beside other work.

With as many threads as cores, each product waits for the thread that the system ran last: where
other programs use the same cores, a step can take twenty times as long as with one thread. Whether
cores are shared, and what is fastest then, is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from sftx import distributed
from sftx.cores import omp_threads, usable_cores
from sftx.settings.schema import Runtime

OURS = 0.8
"""Share of the time in which threads really ran, above which the cores are taken to be ours alone.
"""
WORTH_IT = 1.15
"""So many times faster must more threads be to be taken."""
SECONDS, LEAST = 0.15, 3  # of a trial, and products in it at least
SIZE = 768  # rows and columns of the product that is timed


def asked_threads(runtime: Runtime) -> int | None:
    """What `runtime.threads` or else OMP_NUM_THREADS asks for."""
    return runtime.threads or omp_threads()


def default_threads(runtime: Runtime) -> int:
    """What is asked for, else one per physical core, shared among the processes of the machine."""
    return asked_threads(runtime) or max(1, usable_cores(physical=True) // distributed.local_size())


def choose_threads(
    runtime: Runtime, device: torch.device, earlier: int | None
) -> tuple[int, list[str]]:
    """Set and return the number of threads for a run, and what to say of it, the same on
    every rank.

    A run that is continued keeps its `earlier` number where it can, because sums in another order
    differ by rounding.
    """
    most = default_threads(runtime)
    if device.type != "cpu" or asked_threads(runtime) is not None:
        return torch.get_num_threads(), []
    free = -distributed.all_reduce_max(-fastest(most))
    kept = free if earlier is None or earlier > most else earlier
    torch.set_num_threads(kept)
    notes = []
    if free < most:
        notes.append(
            f"other programs use these cores: of 1 to {most} threads {free} are fastest now "
            "(measured)"
        )
    if kept != free:
        notes.append(
            f"the run keeps its {kept} threads; runtime.threads={free} would change it by rounding"
        )
    if earlier is not None and kept != earlier:
        notes.append(
            f"the run had {earlier} threads, more than there are cores now: from here on it "
            "differs by rounding"
        )
    return kept, notes


def fastest(most: int, trial: Callable[[int], tuple[float, float]] | None = None) -> int:
    """The number of threads, `most` or a half, a quarter ... of it, that is fastest now; `most`
    where the cores are this process' own.

    `trial(threads)` gives the seconds that a product takes, and the share of that time in which its
    threads ran.
    """
    trial = trial or _trial
    counts = [most]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    if most == 1 or trial(most)[1] >= OURS:
        return most
    seconds = dict.fromkeys(counts, 0.0)
    for _ in range(2):  # in turns, because what else runs comes and goes
        for count in counts:
            seconds[count] += trial(count)[0]
    best = 1
    for count in reversed(counts):
        if seconds[count] * WORTH_IT < seconds[best]:
            best = count
    return best


def _trial(threads: int) -> tuple[float, float]:
    """Products of two matrices for a while, with so many threads."""
    torch.set_num_threads(threads)
    a, b, out = (torch.ones(SIZE, SIZE) for _ in range(3))
    torch.mm(a, b, out=out)  # threads are made
    start = time.perf_counter()
    used = time.process_time()
    done = 0
    while done < LEAST or time.perf_counter() - start < SECONDS:
        torch.mm(a, b, out=out)
        done += 1
    wall = time.perf_counter() - start
    return wall / done, (time.process_time() - used) / (wall * threads)
