"""A disk that loses what was not synced: the states in which a crash at any moment may leave a
folder.

`Recorder` watches a folder while something writes into it, whatever library does so. Before and
after every operation that has an order (sync, rename, delete, new folder) it looks at the whole
folder; what it finds changed was written in between. What POSIX promises to be on the disk then is:
the contents of a file at its last sync, and the names in a folder at its last sync. Of the rest
each may be there or not; `states` makes the states that matter.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Names = dict[str, int]  # of a folder: numbers of the files and folders in it


@dataclass(frozen=True)
class Moment:
    """Everything at one time, in memory and on the disk. Files and folders have numbers; that of
    the root is 0.
    """

    folders: dict[int, Names]
    files: dict[int, bytes]
    synced_folders: dict[int, Names]
    synced_files: dict[int, bytes]
    promised: Any  # what the writer was told to be on the disk for good


class Recorder:
    """Records the moments of `root`; `syncs` = which syncs this disk honours, of "files" and
    "folders".
    """

    def __init__(self, root: Path, syncs: tuple[str, ...] = ("files", "folders")) -> None:
        self.root, self.syncs = root, syncs
        self.moments: list[Moment] = []
        self.promised: Any = None
        self._numbers: dict[
            int, int
        ] = {}  # by the number of the inode, which may be given out again
        self._count = 0
        self._every_file: dict[int, bytes] = {}
        self._every_folder: dict[int, Names] = {0: {}}
        self._synced_files: dict[int, bytes] = {}
        self._synced_folders: dict[int, Names] = {0: {}}

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Record until the patches are undone."""
        for name in (
            "rename",
            "replace",
            "unlink",
            "remove",
            "rmdir",
            "mkdir",
            "fsync",
            "fdatasync",
        ):
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.look()
            result = real(*args, **kwargs)
            if name in ("fsync", "fdatasync"):
                self._synced(Path(os.readlink(f"/proc/self/fd/{args[0]}")))
            self.look()
            return result

        return watched

    def look(self) -> None:
        """Record this moment, if anything has changed since the last one."""
        tree = self._tree(self.root)
        seen = {number for number, _, _ in tree}
        folders = {number: names for number, names, _ in tree if names is not None}
        files = {number: content for number, _, content in tree if content is not None}
        self._numbers = {inode: number for inode, number in self._numbers.items() if number in seen}
        self._every_file |= files
        self._every_folder |= folders
        moment = Moment(
            folders, files, {**self._synced_folders}, {**self._synced_files}, self.promised
        )
        if not self.moments or moment != self.moments[-1]:
            self.moments.append(moment)

    def _tree(self, path: Path) -> list[tuple[int, Names | None, bytes | None]]:
        names: Names = {}
        below: list[tuple[int, Names | None, bytes | None]] = []
        for entry in sorted(path.iterdir()):
            names[entry.name] = self._number(entry)
            if entry.is_dir():
                below += self._tree(entry)
            else:
                below.append((names[entry.name], None, entry.read_bytes()))
        return [(self._number(path), names, None), *below]

    def _number(self, path: Path) -> int:
        inode = path.stat().st_ino
        if path == self.root:
            return 0
        if inode not in self._numbers:
            self._count += 1
            self._numbers[inode] = self._count
        return self._numbers[inode]

    def _synced(self, path: Path) -> None:
        if path != self.root and self.root not in path.parents:
            return
        self.look()
        number = self._number(path)
        if path.is_dir() and "folders" in self.syncs:
            self._synced_folders[number] = {**self._every_folder[number]}
        elif path.is_file() and "files" in self.syncs:
            self._synced_files[number] = self._every_file[number]

    def states(self) -> Iterator[tuple[str, Any, dict[Path, bytes | None]]]:
        """(where and how, what was promised, {path: content, None for a folder}), each state and
        promise once.
        """
        known = set()
        for at, moment in enumerate(self.moments):
            for how, state in self._states(moment):
                key = (repr(moment.promised), frozenset(state.items()))
                if key not in known:
                    known.add(key)
                    yield f"moment {at} of {len(self.moments)}, {how}", moment.promised, state

    def _states(self, moment: Moment) -> Iterator[tuple[str, dict[Path, bytes | None]]]:
        now, synced = (
            moment.folders,
            {number: moment.synced_folders.get(number, {}) for number in self._every_folder},
        )
        files = self._every_file | moment.files
        yield (
            "only what was synced",
            self._state(synced, {n: moment.synced_files.get(n, b"") for n in files}),
        )
        yield "all is there", self._state(now, files)
        yield "contents, and only synced names", self._state(synced, files)
        for how, rest in REST.items():
            contents = {
                n: _torn(content, moment.synced_files.get(n, b""), rest)
                for n, content in files.items()
            }
            yield f"names, and of unsynced contents {how}", self._state(now, contents)
        for number, names in now.items():
            if names != synced[number]:
                yield (
                    f"all but the names in folder {number}",
                    self._state({**synced, **now, number: synced[number]}, files),
                )

    def _state(
        self, folders: dict[int, Names], files: dict[int, bytes]
    ) -> dict[Path, bytes | None]:
        found: dict[Path, bytes | None] = {}

        def add(path: Path, number: int) -> None:
            if number in files:
                found[path] = files[number]
                return
            found[path] = None
            for name, child in folders[number].items():
                add(path / name, child)

        add(Path(), 0)
        return found


REST: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "a half": lambda rest: rest[: len(rest) // 2],
    "zeros": lambda rest: bytes(len(rest)),
}


def _torn(content: bytes, synced: bytes, rest: Callable[[bytes], bytes]) -> bytes:
    """A file of which the disk has `synced`, and the rest as `rest` makes it; one written anew has
    lost all of it.
    """
    kept = synced if content.startswith(synced) else b""
    return kept + rest(content[len(kept) :])


def put(root: Path, state: dict[Path, bytes | None]) -> None:
    """Make `root` hold `state`."""
    shutil.rmtree(root, ignore_errors=True)
    for path, content in state.items():
        if content is None:
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).write_bytes(content)
