"""Show what a run did, or how several differ, as one page: `sftx report runs/first runs/second`.

The page is one HTML file that opens from disk: curves of all runs over each other, a table of the
settings that differ, evaluations, answers, steps that stand out with their rows, the ledger. A run
writes its own, `report.html`, at every evaluation and at its end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from sftx.printable import printable
from sftx.report.run_page import NAME, write_report
from sftx.report.send import send
from sftx.settings.schema import Tracker
from sftx.types import UserError

STAGE = "judge"
EXAMPLE = "sftx report runs/first runs/second"
EXTRA = {
    "to": "The file to write; default: report.html in the folder of the run, or, of several runs, "
    "in this folder. A tracker (tensorboard, wandb, mlflow, trackio): "
    "the runs are sent there.",
}


def run(paths: Sequence[str] = (), to: str = "") -> int:
    """Write the page on the runs in the folders `paths`. Returns 0."""
    if not paths:
        raise UserError("sftx report: name the output folder of one run or more")
    folders = [_folder(path) for path in dict.fromkeys(paths)]
    if to in get_args(Tracker):
        steps = sum(send(folder, cast(Tracker, to)) for folder in folders)
        print(f"report   {steps:,} steps sent to {to}", file=sys.stderr)
        return 0
    file = Path(to) if to else (folders[0] / NAME if len(folders) == 1 else Path(NAME))
    if file.is_dir():
        raise UserError(f"sftx report: to={to}: this is a folder; name a file in it")
    write_report(folders, file)
    print(f"report   {printable(str(file))}", file=sys.stderr)
    return 0


def _folder(path: str) -> Path:
    """The folder of a run; that of a trlx script holds it inside."""
    inside = Path(path) / "sftx"
    if (inside / "run.json").is_file():
        return inside
    return Path(path)
