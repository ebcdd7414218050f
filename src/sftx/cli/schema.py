"""Print every setting: as JSON schema for editors, or as the page of the documentation."""

from __future__ import annotations

import json

from sftx.schema import as_json_schema, as_markdown
from sftx.types import UserError

EXTRA = {"format": "json (the default) or markdown"}


def run(format: str = "json") -> int:
    """Print the schema in the format asked for."""
    match format:
        case "json":
            print(json.dumps(as_json_schema(), indent=2))
        case "markdown":
            print(as_markdown(), end="")
        case _:
            raise UserError(f"sftx schema: format={format!r}; allowed: json, markdown")
    return 0
