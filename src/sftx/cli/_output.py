"""Files that a verb writes because it was asked to."""

from __future__ import annotations

import json
from pathlib import Path


def write_json(path: str, value: object) -> None:
    """Write `value` as JSON, for other programs."""
    Path(path).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
