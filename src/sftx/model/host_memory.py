"""Memory of this process on the host, as Linux tells it: what it holds, what it held at most, what
is still free.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sftx.cores import read

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def resident() -> int:
    """Bytes of this process in memory now; 0 where the system does not tell."""
    return _field(PROC / "self/status", "VmRSS")


def resident_peak() -> int:
    """The most bytes this process held since `forget_resident_peak`; 0 where the system does not
    tell.
    """
    return _field(PROC / "self/status", "VmHWM")


def forget_resident_peak() -> None:
    """Begin a new peak, where the system allows it (proc(5), clear_refs)."""
    with suppress(OSError):
        (PROC / "self/clear_refs").write_text("5", encoding="ascii")


def free() -> int:
    """Bytes that this process may still take: free memory of the machine, or room in its control
    groups if less.

    Processes that torchrun starts together share it equally.
    """
    machine = _field(PROC / "meminfo", "MemAvailable") or os.sysconf(
        "SC_AVPHYS_PAGES"
    ) * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_rooms()]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _rooms() -> Iterator[int]:
    """Limit less use of every control group (version 2) of this process; cache the kernel would
    give up is free.
    """
    for line in read(PROC / "self/cgroup").splitlines():
        group = CGROUPS / line.rpartition(":")[2].strip("/")
        for folder in (group, *group.parents):
            if (limit := read(folder / "memory.max").strip()).isdecimal():
                cache = re.search(
                    r"^inactive_file (\d+)", read(folder / "memory.stat"), re.MULTILINE
                )
                used = int(read(folder / "memory.current") or 0) - int(cache[1] if cache else 0)
                yield max(int(limit) - used, 0)


def _field(path: Path, name: str) -> int:
    """A line such as `VmRSS:  123 kB`, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", read(path), re.MULTILINE)
    if found:
        return int(found[1]) << 10
    return 0
