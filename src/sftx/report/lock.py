"""One run owns an output folder for its whole life; a second one is refused, and told who owns it.

The operating system's lock on `OUTPUT/.owner.lock` ends with its process, however that ends.
`OUTPUT/.owner.json` names the owner. On a disk that several machines share, a lock may not reach
the other machines: there the owner renews the time of `.owner.json` every few seconds, and who sees
it renewed keeps away.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from platform import node
from threading import Event, Thread
from typing import Any

from filelock import FileLock, Timeout

from sftx.files import make_folder, write_json
from sftx.types import UserError

LOCK = ".owner.lock"
OWNER = ".owner.json"
BEAT = 10.0
"""Seconds between two renewals of `.owner.json`."""
PATIENCE = 3.5 * BEAT
"""Seconds without a renewal after which an owner on another machine is taken for dead."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own `folder` inside; it is made where it is missing, and removed again where nothing was
    written into it.

    Raises UserError, with the owner's host, process and start time, where another run owns it.
    """
    _refuse_files(folder)
    _refuse_links_out(folder)
    make_folder(folder)
    lock = FileLock(folder / LOCK, blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(_refusal(folder, _owner_soon(folder))) from None
    try:
        _refuse_if_renewed(folder)
        write_json(folder / OWNER, _myself())
        ended = Event()
        Thread(target=_renew, args=(folder / OWNER, ended), daemon=True, name="sftx-owner").start()
        try:
            yield
        finally:
            ended.set()
            (folder / OWNER).unlink(missing_ok=True)
            _remove_if_empty(folder)
    finally:
        lock.release()


def _refuse_files(folder: Path) -> None:
    """A file may stand where the folder, or one above it, is to be."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"output: {folder}: {path} is a file; name another folder")


def _refuse_links_out(folder: Path) -> None:
    """A run writes and deletes in its folder: a link in it must not make that happen elsewhere."""
    root = folder.resolve()
    for place, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(place) / name
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(
                    f"output: {path} is a link to {path.resolve()}, outside of the folder; a run "
                    "does not write there. Remove it, or make the whole output folder a link"
                )


def _myself() -> dict[str, Any]:
    return {**_machine(), "process": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _machine() -> dict[str, str]:
    """This machine since it was started: names of hosts alone are not unique."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": node(),
        "boot": boot.read_text(encoding="ascii").strip() if boot.exists() else "",
    }


def _renew(path: Path, ended: Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):  # the disk is away for a moment, or somebody deleted the folder
            os.utime(path)


def _read(folder: Path) -> tuple[dict[str, Any], int]:
    """The owner that the folder names, {} if none, and when it was renewed, in nanoseconds of the
    disk's clock.
    """
    try:
        with (folder / OWNER).open(
            encoding="utf-8"
        ) as file:  # opening asks a file server anew, a look may not
            owner = json.load(file)
            renewed = os.fstat(file.fileno()).st_mtime_ns
    except (OSError, ValueError):
        return {}, 0
    if isinstance(owner, dict):
        return (owner, renewed)
    return ({}, renewed)


def _owner_soon(folder: Path) -> dict[str, Any]:
    """The owner that holds the lock; it may have it for so short a time that it has not said who it
    is.
    """
    for _ in range(20):
        owner, _ = _read(folder)
        if owner:
            return owner
        time.sleep(0.1)
    return {}


def _refuse_if_renewed(folder: Path) -> None:
    """The lock is ours. Where the last owner ran on another machine, the lock may not tell whether
    it still does.
    """
    owner, before = _read(folder)
    if not owner or _machine().items() <= owner.items():
        return
    print(
        f"output: {folder} was last owned by {_name(owner)}; looking for {PATIENCE:.0f} s whether "
        "that still runs",
        file=sys.stderr,
    )
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(BEAT / 20)
        now, renewed = _read(folder)
        if not now:
            return
        if renewed != before:
            raise UserError(_refusal(folder, now))


def _refusal(folder: Path, owner: dict[str, Any]) -> str:
    mine = owner.get("process") == os.getpid() and _machine().items() <= owner.items()
    this = " (this very process: end the run it began first)" if mine else ""
    return (
        f"output: {folder} is owned by another run: {_name(owner)}{this}. Choose another output "
        "folder, or wait until "
        "that run has ended"
    )


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that does not say who it is"
    return f"process {owner.get('process')} on {owner.get('host')}, started {owner.get('started')}"


def _remove_if_empty(folder: Path) -> None:
    """A run that was refused for a mistake leaves no folder behind."""
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} == {LOCK}:
            (folder / LOCK).unlink()
            folder.rmdir()
