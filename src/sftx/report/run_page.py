"""The report: one page on a run, or on several laid over each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from sftx.files import write_text
from sftx.report.run_data import names_of, run_data
from sftx.report.shell import asset, page

NAME = "report.html"
"""The page in the folder of a run."""


def write_report(folders: Sequence[Path], file: Path) -> None:
    """Write a page on the runs in `folders` to `file`.

    Raises:
        UserError: a folder is not that of a run.
        OSError: the page cannot be written.
    """
    runs = [run_data(folder) for folder in folders]
    for run, name in zip(runs, names_of(folders), strict=True):
        run["name"] = name
    title = ", ".join(str(run["name"]) for run in runs)
    data = {"runs": runs, "written": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    script = asset("run_page.js")
    body = asset("run_page.html")
    write_text(file, page(f"{title} · sftx report", body, data, script))
