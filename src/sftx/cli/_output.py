"""Files that a verb writes because it was asked to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sftx.types import UserError

FILES = ("json", "html")
"""The keys by which any verb is asked for a file."""


def check_files(verb: str, given: Mapping[str, object]) -> None:
    """Refuse a file that could not be written, before the work that it is to tell of."""
    for key in FILES:
        check_file(verb, key, str(given.get(key) or ""))


def check_file(verb: str, key: str, path: str) -> None:
    """UserError where the folder of a file is missing, or the file is a folder; "" is no file."""
    if not path:
        return
    file = Path(path)
    if file.is_dir():
        raise UserError(f"sftx {verb} {key}={path}: this is a folder; name a file")
    if not file.parent.is_dir():
        raise UserError(
            f"sftx {verb} {key}={path}: there is no folder {file.parent}; make it, or name another "
            "file"
        )


def write_json(path: str, value: object) -> None:
    """Write `value` as JSON, for other programs."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")
