"""The model card of an export: what was trained on what, with what result, and what was checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from sftx.report.model_card import public_name

FIELDS = ("license", "license_name", "license_link", "base_model", "datasets")
"""What a hub reads of where a model comes from, and run.json has as far as it is known."""


def card_of(facts: dict[str, Any], checked: str) -> str:
    """README.md for the model that a run.json tells of, with the metadata block model hubs read."""
    config = facts["config"]
    path = str(config["model"].get("path", ""))
    base = public_name(path)
    known = _object(facts.get("card"))
    card = {name: known[name] for name in FIELDS if name in known}
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [sft, sftx]",
    ]
    for name, value in card.items():
        lines.append(f"{name}: {json.dumps(value)}")
    lines += [
        "---",
        "",
        f"# {base}, fine-tuned",
        "",
        f"Exported by sftx from a run that started from `{base}`.",
    ]
    gguf = _object(facts.get("gguf"))
    if gguf:
        file = gguf.get("file")
        digest = gguf.get("sha256")
        lines.append(f"The base was the file `{file}` (sha256 `{digest}`).")
    lines += ["", licence_text(card), ""]
    lines += ["## Data", "", *_data(config), ""]
    lines += ["## Results", "", *_results(facts), ""]
    lines += ["## What the export measured", "", f"{checked}.", ""]
    lines += ["## Settings", "", "```json", *_settings(config), "```", ""]
    versions = _object(facts.get("versions"))
    if versions:
        told = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines += [f"Made with {told}.", ""]
    return "\n".join(lines)


def licence_text(card: Mapping[str, object]) -> str:
    """The licence as a sentence."""
    if "license" not in card:
        return "Licence: not stated. It must fit that of the base and of the data."
    name = card.get("license_name", card["license"])
    link = f" ({card['license_link']})" if "license_link" in card else ""
    return f"Licence: {name}{link}."


def _data(config: dict[str, Any]) -> list[str]:
    train: object = config["data"].get("train")
    sources = cast("list[object]", train) if isinstance(train, list) else [train]
    lines: list[str] = []
    for each in sources:
        if each:
            name = str(_object(each).get("path", each))
            lines.append(f"- `{public_name(name)}`")
    return lines or ["- rows given in Python"]


def _results(facts: dict[str, Any]) -> list[str]:
    """A table of the held-out numbers before and after."""
    before = _object(facts.get("eval_before"))
    after = _object(facts.get("eval_after"))
    lines = [f"{facts['num_steps']} steps, {facts['status']}."]
    if not after:
        return lines
    lines += ["", "| | before | after |", "|---|---|---|"]
    for name, value in after.items():
        first = _number(before.get(name))
        last = _number(value)
        lines.append(f"| {name} | {first} | {last} |")
    return lines


def _object(value: object) -> dict[str, object]:
    """The value where it is an object, else {}."""
    if isinstance(value, dict):
        return cast("dict[str, object]", value)
    return {}


def _number(value: object) -> str:
    if isinstance(value, int | float):
        return f"{value:.4g}"
    return ""


def _settings(config: dict[str, Any]) -> list[str]:
    """The settings that decide the result, without paths of the machine."""
    adapter = dict(_object(config.get("adapter")))
    adapter.pop("path", None)
    kept = {
        "batch": config.get("batch"),
        "optim": config.get("optim"),
        "loss": config.get("loss"),
        "adapter": adapter,
        "seed": config.get("seed"),
    }
    return json.dumps(kept, indent=1).splitlines()
