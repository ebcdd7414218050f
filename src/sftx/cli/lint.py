"""Look for what is likely wrong with data: `sftx lint run.yaml`. Exit code 1 if something serious
is found.

Duplicates, held-out rows that are trained on, outputs that are empty or never end, targets lost to
the length limit, roles out of order, markers of another template, wrongly decoded text, likely
secrets, refusals, answers cut off, HTML, echoes of the prompt, odd arguments of tools. Each finding
names its rows; json= has all of them, with the rows they are like.
"""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from sftx.cli._inputs import tokenizer_and_length
from sftx.cli._output import write_json
from sftx.data.encoder import Encoder
from sftx.data.lint.rules import Finding, lint
from sftx.printable import printable
from sftx.report.progress import working
from sftx.settings.schema import Config

STAGE = "look at data"
EXAMPLE = "sftx lint run.yaml"
EXTRA = {"json": "Write the findings to this file too, for other programs."}
DEFAULTS = ("output=unused",)
SHOWN = 4  # places of a finding on the terminal


def run(config: Config, json: str = "") -> int:
    """Print the findings. Returns 1 if any of them is serious, else 0."""
    tokenizer, max_length = tokenizer_and_length(config)
    with working("looking at the rows", config.runtime.progress) as progress:
        encoder = Encoder(tokenizer, config.data, max_length)
        findings = lint(config, encoder, progress.phase)
    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        _print(finding, console)
    serious = any(finding.serious for finding in findings)
    summary = "nothing serious" if findings else "nothing found"
    console.print("something serious was found" if serious else summary)
    if json:
        write_json(json, [asdict(finding) for finding in findings])
    return int(serious)


def _print(finding: Finding, console: Console) -> None:
    mark = "[bold red]serious[/]" if finding.serious else "[yellow]note   [/]"
    console.print(
        f"{mark} [bold]{finding.check}[/]: {finding.count:,} {escape(printable(finding.message))}"
    )
    for number, place in enumerate(finding.places[:SHOWN]):
        like = f" is like {finding.partners[number]}" if finding.partners else ""
        console.print(f"        {printable(place + like)}", markup=False)
    if finding.count > SHOWN:
        console.print(f"        and {finding.count - SHOWN:,} more", style="dim")
