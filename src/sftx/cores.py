"""CPU cores that this process may use: those it is bound to, fewer where a control group limits its
time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS, CPUS = Path("/proc"), Path("/sys/fs/cgroup"), Path("/sys/devices/system/cpu")


def usable_cores(physical: bool = False) -> int:
    """How many cores' worth of time this process may take, at least 1; `physical` counts the
    hardware threads of a core once.
    """
    allowed = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    siblings = "cpu{}/topology/thread_siblings_list"
    cores = (
        {read(CPUS / siblings.format(cpu)) or cpu for cpu in allowed} if physical else set(allowed)
    )
    return max(1, min([len(cores), *map(int, quotas())]))


def quotas() -> Iterator[float]:
    """Cores' worth of time that each control group of this process may take, for those that have a
    limit.

    Version 2 writes `quota period` into cpu.max, version 1 each into a file of its own; both in
    microseconds.
    """
    for line in read(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = CGROUPS / controllers / path.strip("/")
        for folder in (group, *group.parents):
            limit = read(folder / "cpu.max").split() or [
                read(folder / "cpu.cfs_quota_us").strip(),
                read(folder / "cpu.cfs_period_us").strip(),
            ]
            if all(number.isdecimal() for number in limit):  # "max" and -1 are no limit
                yield int(limit[0]) / int(limit[1])


def omp_threads() -> int | None:
    """What OMP_NUM_THREADS asks for; None where it asks for nothing.

    torchrun sets it to 1 for several processes when the user has not set it, so that 1 is no wish
    there.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    by_torchrun = first == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    return int(first) if first.isdecimal() and int(first) and not by_torchrun else None


def read(path: Path) -> str:
    """A file that the kernel writes; empty where there is none."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
