"""Copies of a run in a folder elsewhere: sealed checkpoints while it trains, the whole of it at its end.

URL/checkpoints/step-N/   as in the run's folder; a manifest, which is sent last, says that all is there
URL/*                     `BESIDE` with every checkpoint, everything else at the end

What goes wrong here never ends a run, nor takes anything away from its own folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Lock, Thread
from typing import Any, cast

from sftx.boundary import boundary
from sftx.files import make_folder
from sftx.remote import open_url
from sftx.report.lock import LOCK, OWNER
from sftx.report.record import SAMPLES
from sftx.training import checkpoint
from sftx.types import UserError

GAUGE = "gauge.safetensors"
"""What the base said and thought before the first step, beside the checkpoints."""
ARRIVING = "base.tmp"
"""Where a run arrives before it is whole."""
BESIDE = (f"checkpoints/{GAUGE}", SAMPLES, "run.json")
"""What goes with every checkpoint and is not in it; what has a run.json is a run, so that comes last."""
LEFT_OUT = (LOCK, OWNER, "checkpoints")


class Mirror:
    """The copy at `url` of the run in `folder`; `say` is told what goes wrong."""

    def __init__(self, url: str, folder: Path, say: Callable[[str], None]) -> None:
        self.url = url
        self.folder = folder
        self.say = say
        files, self.root = open_url(url, "checkpoint.mirror")
        self.files: Any = files
        self._thread: Thread | None = None
        self._lock = Lock()
        self._wanted = self._whole = False
        self._failed = False

    def send(self) -> None:
        """Begin to send what is there and not yet sent; at once, or after what is being sent."""
        with self._lock:
            self._wanted = True
            if self._thread is None:
                # A daemon: a job that is told to end at once does not wait for it.
                self._thread = Thread(target=self._work, daemon=True, name="sftx-mirror")
                self._thread.start()

    def finish(self, whole: bool) -> None:
        """Send what is left, with `whole` the finished run too, and wait until that is done."""
        self._whole = whole
        self.send()
        while (thread := self._thread) is not None:
            thread.join()
        if whole and self._failed:
            self.say(f"{self.url} lacks the end of this run; run the same command again to send it")

    def fetch(self) -> int | None:
        """Bring the run into its folder, which has none: its files, and the newest checkpoint that
        is whole. Returns the step of that checkpoint, 0 for a run without any, None where there is no run.
        """
        hint = "; checkpoint.resume: never begins anew without looking there"
        with boundary(f"checkpoint.mirror: {self.url} cannot be read", hint):
            self.files.invalidate_cache()
            if not self.files.exists(f"{self.root}/run.json"):
                return None
            arriving = self.folder / ARRIVING
            shutil.rmtree(arriving, ignore_errors=True)
            step = self._fetch_checkpoint(arriving / "checkpoints")
            for folder in ("", "checkpoints/"):
                for name in self._names(f"{self.root}/{folder}", "file"):
                    there = f"{self.root}/{folder}{name}"
                    here = arriving / folder / name
                    self.files.get_file(there, str(here))
        for path in sorted(arriving.iterdir(), key=lambda path: path.name == "run.json"):
            path.replace(self.folder / path.name)
        arriving.rmdir()
        return step

    def _fetch_checkpoint(self, into: Path) -> int:
        make_folder(into)
        there = f"{self.root}/checkpoints"
        for name in sorted(self._names(there, "directory"), reverse=True):
            target = into / name
            target.mkdir()
            for file in self._names(f"{there}/{name}", "file"):
                self.files.get_file(f"{there}/{name}/{file}", str(target / file))
            state = checkpoint.newest(into)
            if state is not None:
                return state.step
            self.say(f"{self.url}: {name} is not whole there; trying the one before")
            shutil.rmtree(target)
        return 0

    def _names(self, folder: str, kind: str) -> list[str]:
        """The names of what is in a folder there, without their paths."""
        if not self.files.isdir(folder):
            return []
        entries = cast(list[dict[str, Any]], self.files.ls(folder, detail=True, refresh=True))
        names = [str(entry["name"]).rstrip("/") for entry in entries if entry["type"] == kind]
        return [Path(name).name for name in names]

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                self._wanted = False
            try:
                with boundary(f"checkpoint.mirror: {self.url}"):
                    self._send_all()
            except (UserError, OSError, MemoryError) as error:
                self._note(str(error))
            else:
                self._failed = False

    def _note(self, problem: str) -> None:
        if not self._failed:
            self.say(
                f"{problem}; the run's own folder is whole; sent again with the next checkpoint"
            )
        self._failed = True

    def _send_all(self) -> None:
        self.files.makedirs(f"{self.root}/checkpoints", exist_ok=True)
        sealed = [path.name for path in checkpoint.folders(self.folder / "checkpoints")]
        there = set(self._names(f"{self.root}/checkpoints", "directory"))
        for name in sealed:
            self._send_checkpoint(name)
        for name in BESIDE:
            if (self.folder / name).exists():
                self.files.put_file(str(self.folder / name), f"{self.root}/{name}")
        if self._whole:
            self._send_whole()
        for name in there - set(sealed) if sealed else ():
            self.files.rm(f"{self.root}/checkpoints/{name}", recursive=True)

    def _send_checkpoint(self, name: str) -> None:
        """One checkpoint, its manifest last; nothing where that is there already."""
        there = f"{self.root}/checkpoints/{name}"
        here = self.folder / "checkpoints" / name
        manifest = here / checkpoint.MANIFEST
        sent = f"{there}/{checkpoint.MANIFEST}"
        if self.files.exists(sent) and self.files.cat_file(sent) == manifest.read_bytes():
            return
        self.files.makedirs(there, exist_ok=True)
        paths = [path for path in sorted(here.iterdir()) if path != manifest]
        for path in [*paths, manifest]:
            try:
                self.files.put_file(str(path), f"{there}/{path.name}")
            except FileNotFoundError:
                if here.exists():
                    raise
                return  # deleted meanwhile: newer ones are there

    def _send_whole(self) -> None:
        """Every file of the run's folder beside the checkpoints, in folders too."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            hidden = name.parts[0] in LEFT_OUT or path.name.endswith(".tmp")
            if path.is_file() and not hidden and name.name != "run.json":
                self.files.makedirs(f"{self.root}/{name.parent.as_posix()}", exist_ok=True)
                self.files.put_file(str(path), f"{self.root}/{name.as_posix()}")
