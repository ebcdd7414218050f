"""Room on the disk: asked for before something is written, so that nothing stays half written."""

from __future__ import annotations

import shutil
from pathlib import Path

SPARE = 1.2
"""Times what the tensors take: beside them there are names, a manifest, a tokenizer."""


def shortage(folder: Path, needed: int) -> bool:
    """Whether the disk of `folder`, which need not be there yet, lacks room for tensors of `needed`
    bytes.
    """
    return _free(folder) < SPARE * needed


def numbers(folder: Path, needed: int) -> str:
    """Needed and free, in words."""
    return f"{SPARE * needed / 2**20:,.1f} MiB needed, {_free(folder) / 2**20:,.1f} MiB free"


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
