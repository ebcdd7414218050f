"""Print every setting: as JSON schema for editors, as the page of the documentation, or as types
for Python.
"""

from __future__ import annotations

import json

from sftx.settings.documents import as_json_schema, as_markdown
from sftx.settings.typed_keywords import as_python
from sftx.types import UserError

STAGE = "set up"
EXAMPLE = "sftx schema > schema.json"
EXTRA = {"format": "json (the default), markdown or python"}


def run(format: str = "json") -> int:
    """Print the schema in the format asked for."""
    match format:
        case "json":
            print(json.dumps(as_json_schema(), indent=2))
        case "markdown":
            print(as_markdown(), end="")
        case "python":
            print(as_python(), end="")
        case _:
            raise UserError(f"sftx schema: format={format!r}; allowed: json, markdown, python")
    return 0
