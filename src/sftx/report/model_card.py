"""The model card: README.md of a trained folder, made from the run's record."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from sftx.report.facts import RunFacts
from sftx.report.record import Run
from sftx.types import Ledger


def model_card(run: Run, sources: list[str], ledger: Ledger) -> str:
    """What was trained, on what, how, and with what result, in Markdown with the metadata block
    model hubs read.
    """
    config = run.config
    facts = run.facts
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [sft, sftx]",
    ]
    base = public_name(config.model.path)
    lines += [f"{name}: {json.dumps(value)}" for name, value in facts.card.items()]
    lines += ["---", "", f"# {run.folder.resolve().name}", ""]
    taken = f"{facts.ended_at:,} of " if facts.ended_at is not None else ""
    kind = (
        "all weights" if config.adapter.method == "none" else f"a {config.adapter.method} adapter"
    )
    lines += [
        f"`{base}`, fine-tuned with sftx ({kind}, {taken}{facts.num_steps:,} steps, "
        f"peak learning rate {facts.peak_learning_rate:g}, {facts.precision}).",
        "",
        "## Data",
        "",
        *(f"- `{public_name(source)}`" for source in sources),
        "",
        ledger.summary() + ".",
        "",
    ]
    lines += _results(facts)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    lines += [
        "## How to repeat it",
        "",
        "`config.yaml` in this folder holds the settings: `sftx train config.yaml`. Made with "
        f"{versions}.",
        "",
    ]
    if config.runtime.report:
        lines += ["`report.html` in this folder shows how the training went.", ""]
    return "\n".join(lines)


def _results(facts: RunFacts) -> list[str]:
    """What the held-out rows say of the model, before and after."""
    lines: list[str] = []
    before = facts.eval_before or {}
    after = facts.eval_after or {}
    if facts.best is not None:
        best = facts.best
        lines += [
            f"These are the weights after step {best['step']:,}, the best by {best['metric']} "
            f"({best['value']:.4g}).",
            "",
        ]
    if facts.stopped_early is not None:
        lines += [f"Training stopped early: {facts.stopped_early}.", ""]
    if "loss" in after:
        lines += ["## Held-out loss", "", "| | nats per token | perplexity |", "|---|---|---|"]
        lines += [
            f"| {name} | {numbers['loss']:.4f} | {numbers['perplexity']:.2f} |"
            for name, numbers in (("before", before), ("after", after))
            if "loss" in numbers
        ]
        lines.append("")
    return lines + _others(before, after)


def _others(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """A table of all numbers but the loss."""
    lines: list[str] = []
    judged = [name for name in after if name not in ("loss", "perplexity", "targets")]
    if judged:
        lines += ["## Other held-out numbers", "", "| | before | after |", "|---|---|---|"]
        for name in judged:
            was = f"{before[name]:.4g}" if name in before else ""
            lines.append(f"| {name} | {was} | {after[name]:.4g} |")
        lines.append("")
    return lines


def public_name(path: str) -> str:
    """What others may know of a model or a data set: its name on the hub, else the last part of its
    path here.
    """
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)*(:[^/]*)?", path) and path.count("/") in (1, 2)
    is_here = Path(path).exists() or Path(path.partition("/")[0]).exists()
    if is_hub_name and not is_here:
        return path
    return Path(path).name or Path(path).resolve().name
