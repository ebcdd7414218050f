"""Cores, memory and disks. No torch."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sftx.cores import quotas, usable_cores
from sftx.data.store.cache import folder_of
from sftx.doctor.check import Check, gib
from sftx.model.host_memory import free

CHUNK = 8 << 20
WRITE_SECONDS, WRITE_MOST = 1.0, 512 << 20
"""A disk is written to for so long, and so much, at most."""
LITTLE_DISK, SLOW_DISK = 5 << 30, 50e6
"""Bytes that a run of a small model may well need, and bytes a second below which saving shows."""
LITTLE_MEMORY = 2 << 30


def system() -> Iterator[Check]:
    """Python, cores and memory."""
    on_linux = platform.system() == "Linux"
    yield Check(
        "machine",
        "system",
        f"{platform.system()} {platform.release()} {platform.machine()}, Python "
        f"{platform.python_version()}",
        "ok" if on_linux else "note",
        "" if on_linux else "training is tested on Linux; the data tools run everywhere",
    )
    yield _cores()
    memory = free()
    little = memory < LITTLE_MEMORY
    yield Check(
        "machine",
        "memory",
        f"{gib(memory)} free for this process",
        "note" if little else "ok",
        "only small models fit; end other programs, or train an adapter" if little else "",
        {"free": float(memory)},
    )


def _cores() -> Check:
    cores = usable_cores()
    physical = usable_cores(physical=True)
    present = os.cpu_count() or cores
    limits = list(quotas())
    limit = f", a control group leaves the time of {min(limits):g}" if limits else ""
    threads = os.environ.get("OMP_NUM_THREADS")
    said = f"{cores} of {present} usable, {physical} physical{limit}"
    if threads:
        said += f"; OMP_NUM_THREADS={threads}"
    few = bool(threads) and threads.isdecimal() and int(threads) < physical
    return Check(
        "machine",
        "cores",
        said,
        "note" if few else "ok",
        f"OMP_NUM_THREADS holds training to {threads} of {physical} cores; unset it" if few else "",
        {"usable": cores, "physical": physical},
    )


def disks(output: str) -> Iterator[Check]:
    """Room and speed where runs, tokens and temporary files go."""
    places = {
        "output": Path(output),
        "cache": folder_of(None),
        "temporary": Path(tempfile.gettempdir()),
    }
    for name, folder in places.items():
        yield _disk(name, folder)


def _disk(name: str, folder: Path) -> Check:
    """Room and speed of the folder, or of the nearest above it that is there; nothing is left."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        room = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as file:
            speed = _write_speed(file.fileno(), room)
    except OSError as error:
        advice = "choose another folder with " + _SETTING[name]
        return Check("disk", name, f"{folder}: {error.strerror}", "problem", advice)
    figures = {"free": float(room), "bytes_per_second": speed}
    said = f"{folder}: {gib(room)} free, writes {speed / 1e6:,.0f} MB/s"
    if room < LITTLE_DISK:
        advice = f"a checkpoint takes 12 bytes a weight; choose a larger disk with {_SETTING[name]}"
        return Check("disk", name, said, "note", advice, figures)
    if speed < SLOW_DISK:
        advice = "saving will take long; checkpoint.background=true writes while training goes on"
        return Check("disk", name, said, "note", advice, figures)
    return Check("disk", name, said, figures=figures)


_SETTING = {
    "output": "output=FOLDER",
    "cache": "data.cache=FOLDER or SFTX_CACHE",
    "temporary": "TMPDIR",
}


def _write_speed(file: int, room: int) -> float:
    """Bytes per second, until they are on the disk."""
    block = os.urandom(1 << 20) * (CHUNK >> 20)
    most = min(WRITE_MOST, room // 4)
    written = 0
    began = time.perf_counter()
    while time.perf_counter() - began < WRITE_SECONDS and written + CHUNK <= most:
        written += os.write(file, block)
        os.fsync(file)
    return written / (time.perf_counter() - began)
