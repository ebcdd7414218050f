"""The files of a model that a file names, which are read and never fetched."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from sftx.boundary import boundary


def on_disk(name: str, place: str, hint: str) -> str:
    """The folder (or the GGUF file) of a model that a file names: a name on the hub only where its
    files have been fetched before, since the caller did not ask for it.

    Raises:
        UserError: it is not on this disk; `place` says what is not, `hint` what to do.
    """
    with boundary(place, hint):  # the name may be anything
        if Path(name).is_dir() or name.endswith(".gguf"):
            return name
        return snapshot_download(name, local_files_only=True)
