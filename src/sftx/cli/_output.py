"""Files that a verb writes because it was asked to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftx.types import UserError


def write_text(path: str, text: str) -> None:
    """Write `text` to `path`; UserError if it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def write_json(path: str, value: Any) -> None:
    """Write `value` as JSON, for other programs."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
