"""The token cache: a folder with one file for each block of rows, named by everything its tokens
depend on.

A file appears whole or not at all (temporary name, fsync, rename), so processes may share a cache
and a killed one leaves nothing that looks finished. A file that is damaged is as if it were not
there.

Whoever may not write the cache can use what is in it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sftx.data.store.block import Block, block_bytes, open_block
from sftx.types import UserError

VERSION = "6"
"""Raise it when the same rows must be encoded anew: the layout of blocks, or the parsing of rows,
has changed.
"""


def folder_of(given: str | None) -> Path:
    """The folder of the cache; the default is $SFTX_CACHE, else ~/.cache/sftx."""
    return Path(given or os.environ.get("SFTX_CACHE") or "~/.cache/sftx").expanduser()


class Cache:
    """A folder of encoded blocks, `folder_of` what is given."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder_of(folder)
        self.writable = True
        try:
            (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder / "tmp").close()
        except OSError as error:
            self.writable = False
            if not self.folder.is_dir():
                raise UserError(
                    f"{self.folder}: the token cache cannot be written here ({error}); set "
                    "data.cache"
                ) from None

    def path(self, key: str, suffix: str = ".npy") -> Path:
        """Where the block (or, with another suffix, the note about a file) called `key` lives."""
        return self.folder / key[:2] / (key + suffix)

    def load(self, key: str) -> Block | None:
        """The block `key`, mapped into memory; None if it is absent or its file is not whole."""
        return open_block(self.path(key))

    def save(self, key: str, block: Block) -> None:
        """Write a block: it appears under its name whole, and survives a crash of the machine from
        then on.
        """
        self.write(self.path(key), block_bytes(block))

    def write(self, path: Path, content: bytes) -> None:
        """Put `content` at `path`, whole or not at all."""
        temporary = None
        try:
            path.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder / "tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            raise UserError(
                f"{path}: the token cache cannot be written ({error}); set data.cache"
            ) from None

    def write_note(self, path: Path, value: object) -> None:
        """Put a JSON value at `path` with its hash; nothing where the cache may not be written."""
        if self.writable:
            text = json.dumps(value)
            self.write(path, f"{_digest(text)} {text}".encode())

    def read_note(self, path: Path) -> dict[str, Any] | None:
        """What `write_note` wrote; None if nothing is there, or something else."""
        try:
            digest, _, text = path.read_text(encoding="utf-8").partition(" ")
        except (OSError, UnicodeDecodeError):
            return None
        return json.loads(text) if digest == _digest(text) else None

    @contextmanager
    def turn(self, name: str) -> Generator[None]:
        """The first process of those that call the same `name` goes on; the others wait until it is
        done.

        So the ranks of a node encode their data once. The rest then goes on at the same time.
        """
        if not self.writable:  # what is not there cannot be made: nobody has to wait for it
            yield
            return
        path = self.path(blake2b(name.encode(), digest_size=20).hexdigest(), ".lock")
        path.parent.mkdir(exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            with lock:
                pass
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def scratch(self) -> Generator[Path]:
        """A folder for files that live as long as the block of code; what killed processes left
        long ago goes too.
        """
        if not self.writable:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)
            return
        tmp = self.folder / "tmp"
        for entry in os.scandir(tmp):
            try:
                if entry.stat().st_mtime < time.time() - 3 * 86400:
                    shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
            except (FileNotFoundError, PermissionError):
                continue  # another process was first, or it is another user's
        with tempfile.TemporaryDirectory(dir=tmp) as folder:
            yield Path(folder)


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()
