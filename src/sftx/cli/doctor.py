"""Say what this machine can do, and which settings to try: `sftx doctor`.

Cores, memory, room and speed of the disks, versions, GPUs and whether they reach each other, the
speed of matrix products, optional packages. It takes a few seconds, 15 at most, writes nothing that
stays, and fetches nothing. Exit code 1 where something is in the way of training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sftx.cli._output import write_json
from sftx.doctor import compute, host, packages
from sftx.doctor.advice import verdict
from sftx.doctor.check import Check
from sftx.printable import printable

STAGE = "begin"
EXAMPLE = "sftx doctor output=/data/runs"
EXTRA = {
    "output": "The folder in which runs will lie, whose disk is measured; default: here.",
    "json": "Write all figures to this file.",
}
COLOURS = {"ok": "", "note": "yellow", "problem": "bold red"}


def run(output: str = ".", json: str = "") -> int:
    """Print what was found. Returns 1 where something is in the way of training, else 0."""
    began = time.perf_counter()
    console = Console(highlight=False)
    checks: list[Check] = []
    with console.status("looking at the machine") as status:
        for check in _checks(output):
            status.update(f"looking at the machine: {check.name}")
            checks.append(check)
    console.print(_table(checks))
    has_bitsandbytes = packages.installed("bitsandbytes") is not None
    lines = verdict(checks, has_bitsandbytes)
    for line in lines:
        console.print(printable(line), markup=False, soft_wrap=True)
    seconds = time.perf_counter() - began
    console.print(f"looked for {seconds:.0f} s", style="dim")
    if json:
        write_json(json, {"checks": [asdict(check) for check in checks], "verdict": lines})
    return int(any(check.state == "problem" for check in checks))


def _checks(output: str) -> Iterator[Check]:
    yield from host.system()
    yield from host.disks(output)
    yield from packages.needed()
    torch, problem = compute.torch_module()
    if torch is None:
        if packages.installed("torch"):
            advice = "install PyTorch anew: https://pytorch.org/get-started"
            yield Check("compute", "PyTorch", f"cannot be imported: {problem}", "problem", advice)
    else:
        yield from compute.gpus()
        yield from compute.products()
    yield from packages.optional()


def _table(checks: list[Check]) -> Table:
    """A line for each; what to do stands beneath it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    group = ""
    for check in checks:
        first = "" if check.group == group else check.group
        group = check.group
        text = Text(printable(check.found), COLOURS[check.state])
        if check.advice:
            text.append(f"\n-> {printable(check.advice)}", "bold")
        table.add_row(Text(first, "bold"), check.name, text)
    return table
