"""What a run folder needs to be repeated: its settings as YAML, and the rows that were only in
memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftx.data.sources.tables import MEMORY
from sftx.data.sources.to_jsonl import dump as as_line
from sftx.report.record import write_text
from sftx.settings.schema import Config
from sftx.settings.strict_yaml import dump

CONFIG = "config.yaml"
_HEAD = """\
# The settings of this run. Once more, in another folder: sftx train {file} output=ANOTHER
# Relative paths are seen from the folder in which the run was started.
"""


def write_settings(folder: Path, config: Config) -> None:
    """Write `config.yaml`, and beside it the rows held in memory as they are read, one JSON value
    per line.
    """
    settings = config.model_dump(
        mode="json", exclude_unset=True, exclude={"data": {"rows", "eval_rows"}}
    )
    data = settings["data"]
    for rows, name, setting in (
        (config.data.rows, "rows", "train"),
        (config.data.eval_rows, "eval_rows", "eval"),
    ):
        if rows is not None:
            path = _written(folder / f"{name}.jsonl", rows)
            data[setting] = [*_listed(data.get(setting)), {"path": path, "name": MEMORY}]
    for name, rows in (("prompts", config.eval.prompts), ("general", config.eval.general)):
        if isinstance(rows, list):
            settings["eval"][name] = _written(folder / f"eval_{name}.jsonl", rows)
    write_text(folder / CONFIG, _HEAD.format(file=folder / CONFIG) + dump(settings))


def _written(path: Path, rows: list[Any]) -> str:
    """The path of a file that holds `rows`."""
    write_text(path, "".join(as_line(row).decode() + "\n" for row in rows))
    return str(path)


def _listed(sources: Any) -> list[Any]:
    """The sources of a setting, as a list."""
    if sources is None:
        return []
    if isinstance(sources, str):
        return [sources]
    return list(sources)
