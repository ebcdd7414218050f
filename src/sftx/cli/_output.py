"""Files that a verb writes because it was asked to."""

from __future__ import annotations

import json
from pathlib import Path

from sftx.types import UserError


def check_target(name: str, path: str) -> None:
    """UserError where the file that the key `name` asks for could not be written: before the work."""
    folder = Path(path).parent
    if path and not folder.is_dir():
        raise UserError(
            f"{name}={path}: there is no folder {folder}; make it, or name another file"
        )


def write_json(path: str, value: object) -> None:
    """Write `value` as JSON, for other programs."""
    Path(path).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
