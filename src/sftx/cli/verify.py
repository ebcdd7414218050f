"""Measure, on your model and rows, what sftx promises: `sftx verify MODEL DATA`.

One table: the fused loss is the model's own, packed is separate, any pack size, any order, one
process is two, resumed is uninterrupted, the trained prompts are the served ones, the stop token is
learned, the merged adapter is the adapter, the saved model is the trained one. The other side of
every comparison is transformers, peft and PyTorch alone. A few rows and steps are taken, so that it
ends in minutes with a model of any size; all of it happens in a temporary folder. MODEL may be the
folder of an adapter; `sftx verify run.yaml` takes the settings of a run.

Exit code 1 where something differs.

`sftx verify families` tries every causal language model of the installed transformers instead, each
as a small copy with random weights: exact in packs, in right-padded batches of like lengths, alone
(every example by itself), or refused. All of them take about 20 minutes on one core; only=llama,qwen
restricts it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sftx.cli._inputs import whole_number
from sftx.cli._output import check_target, write_json
from sftx.printable import printable
from sftx.settings.schema import Config
from sftx.types import UserError
from sftx.verify.finding import Finding
from sftx.verify.table import verify

STAGE = "prove"
EXAMPLE = "sftx verify runs/first chats.jsonl"
POSITIONAL = ("model", "data")
EXTRA = {
    "rows": "How many rows are taken; default: 32.",
    "tokens": "Most tokens of an example that runs through the model; default: 128.",
    "json": "Write the table to this file.",
    "only": "With `families`: the model types that begin so, with commas between them: llama,qwen.",
}
DEFAULTS = ("output=unused", "data.format=auto")
COLOURS = {"equal": "green", "differs": "bold red", "not applicable": "dim"}


def run(
    config: Config, rows: str = "32", tokens: str = "128", json: str = "", only: str = ""
) -> int:
    """Print the table. Returns 1 where something differs, else 0."""
    check_target("sftx verify: json", json)
    has_data = bool(config.data.train or config.data.rows)
    if config.model.path == "families" and not has_data:
        return _families(json, only, config.runtime.progress)
    if only:
        raise UserError("sftx verify: only= belongs to `sftx verify families`")
    if not has_data:
        raise UserError(
            "sftx verify: no rows are named; write `sftx verify MODEL DATA`, or `sftx verify "
            "run.yaml`"
        )
    began = time.perf_counter()

    def say(text: str) -> None:
        if config.runtime.progress:
            seconds = time.perf_counter() - began
            print(f"{seconds:5.0f} s  {printable(text)}", file=sys.stderr, flush=True)

    count = whole_number("verify: rows", rows)
    longest = whole_number("verify: tokens", tokens, 8)
    findings = _found(config, count, longest, say)
    if json:
        write_json(json, [asdict(finding) for finding in findings])
    return _print(findings, time.perf_counter() - began)


def _found(config: Config, rows: int, tokens: int, say: Callable[[str], None]) -> list[Finding]:
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="sftx-verify-") as folder:
        for finding in verify(config, Path(folder), rows, tokens, say):
            say(f"{finding.what}: {finding.verdict}")
            findings.append(finding)
    return findings


def _print(findings: list[Finding], seconds: float) -> int:
    """The table, and what differs once more; the exit code."""
    Console(highlight=False).print(_table(findings))
    different = [finding for finding in findings if finding.verdict == "differs"]
    for finding in different:
        print(printable(f"differs: {finding.what}: {finding.why or finding.largest()}"))
    print(f"{len(findings)} properties in {seconds:,.0f} s; {len(different)} differ")
    return int(bool(different))


def _table(findings: list[Finding]) -> Table:
    """What was asked, with how it was measured beneath it."""
    table = Table(box=None, pad_edge=False)
    table.add_column("what, and how it was measured", ratio=1)
    table.add_column("largest difference", max_width=26)
    table.add_column("verdict", no_wrap=True)
    for finding in findings:
        how = finding.how
        if finding.verdict == "not applicable":
            how = finding.why
        table.add_row(
            Text(finding.what, "bold"),
            finding.largest(),
            Text(finding.verdict, COLOURS[finding.verdict]),
        )
        table.add_row(Padding(Text(printable(how), "dim"), (0, 0, 0, 2)))
    return table


def _families(json: str, only: str, shown: bool) -> int:
    from sftx.verify.families import summary, try_families

    names = [name.strip() for name in only.split(",") if name.strip()]
    found = {}
    for family in try_families(names, shown):
        found[family.name] = family
        print(printable(f"{family.name:28}{family.verdict:15}{family.detail()}"), flush=True)
    print(summary(list(found.values())))
    if json:
        write_json(json, {name: asdict(family) for name, family in found.items()})
    return int(any(family.verdict == "wrong" for family in found.values()))
