"""The model card: README.md of a trained folder, made from the run's record."""

from __future__ import annotations

from sftx.track.record import Run
from sftx.types import Ledger


def model_card(run: Run, sources: list[str], ledger: Ledger) -> str:
    """What was trained, on what, how, and with what result, in Markdown with the metadata block model hubs read."""
    config, facts = run.config, run.facts
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [sft, sftx]"]
    base = config.model.path
    lines += [f"base_model: {base}", "---", "", f"# {run.folder.name}", ""]
    kind = "all weights" if config.adapter.method == "none" else f"a {config.adapter.method} adapter"
    lines += [
        f"`{base}`, fine-tuned with sftx ({kind}, {facts['num_steps']:,} steps, "
        f"peak learning rate {facts['peak_learning_rate']:g}, {facts['precision']}).",
        "",
        "## Data",
        "",
        *(f"- `{source}`" for source in sources),
        "",
        ledger.summary() + ".",
        "",
    ]
    before, after = facts.get("eval_before"), facts.get("eval_after")
    if after:
        lines += ["## Held-out loss", "", "| | nats per token | perplexity |", "|---|---|---|"]
        lines += [
            f"| {name} | {numbers['loss']:.4f} | {numbers['perplexity']:.2f} |"
            for name, numbers in (("before", before), ("after", after))
            if numbers
        ]
        lines.append("")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines += ["## How to repeat it", "", f"`run.json` in this folder holds every setting. Made with {versions}.", ""]
    return "\n".join(lines)
