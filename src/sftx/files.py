"""Writing files so that neither a crash nor a power loss leaves something half done.

What was written is on the disk only once the file was synced; a new name, a renamed or a deleted
one only once its folder was.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until the disk has the contents of a file, or the names in a folder."""
    flags = os.O_RDONLY
    if os.name == "nt":  # which opens no folder, and syncs only what is open for writing
        if path.is_dir():
            return
        flags = os.O_RDWR
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_link(path: str, flags: int) -> int:
    """An `opener` for files of a run's folder; OSError where a link stands there, which somebody
    made after the folder was looked through.
    """
    no_follow = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
    return os.open(path, flags | no_follow, 0o666)


def make_folder(path: Path) -> None:
    """Make the folder, and those above it that are missing; each is on the disk."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def write_json(path: Path, value: object) -> None:
    """Write `value` as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that the file is the old one or the new one, whatever happens meanwhile."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", opener=no_link) as file:
            file.write(text)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
