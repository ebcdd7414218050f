"""The settings of a run as it will have them: what is set, and what stands for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sftx.settings.describe import settings, shown
from sftx.settings.schema import Config

MATTERS = (
    "data.max_length",
    "data.too_long",
    "data.template",
    "data.train_on",
    "batch.examples_per_step",
    "batch.tokens_per_step",
    "batch.epochs",
    "batch.steps",
    "optim.learning_rate",
    "optim.schedule",
    "optim.warmup",
    "optim.weight_decay",
    "adapter.method",
    "adapter.rank",
    "adapter.alpha",
    "adapter.targets",
    "model.save_dtype",
    "eval.every",
    "checkpoint.minutes",
    "checkpoint.keep",
    "runtime.device",
    "runtime.precision",
    "runtime.tokens_per_pack",
    "runtime.recompute",
    "seed",
)
"""Settings whose default a person wants to see."""


def resolved(
    config: Config, stand_ins: Sequence[str], found: Mapping[str, object]
) -> dict[str, dict[str, object]]:
    """`set` and `default`: dotted settings with their values.

    `stand_ins` are overrides that a verb put in for settings it can do without, such as
    `output=unused`: they are left out. `found` holds what a default comes to here (a learning rate,
    a device).
    """
    unset = {override.partition("=")[0]: override.partition("=")[2] for override in stand_ins}
    given: dict[str, object] = {}
    default: dict[str, object] = {}
    whole = config.model_dump(mode="json")
    only_set = config.model_dump(mode="json", exclude_unset=True)
    for key in settings():
        value = _at(whole, key)
        is_set = _at(only_set, key) is not None
        if key in unset and str(value) == unset[key]:
            continue
        if is_set:
            given[key] = value
        elif key in MATTERS and _applies(config, key):
            value = found.get(key, value)
            if value is not None:
                default[key] = value
    return {"set": given, "default": default}


def _at(value: object, key: str) -> object:
    """What stands at a dotted key; None where nothing does."""
    for name in key.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _applies(config: Config, key: str) -> bool:
    """Whether a default plays a part in this run."""
    section, _, name = key.partition(".")
    if section == "adapter" and name != "method":
        return config.adapter.method != "none"
    if key == "batch.examples_per_step":
        return config.batch.tokens_per_step is None
    if key == "batch.epochs":
        return config.batch.steps is None
    if section == "eval":
        return bool(config.data.eval or config.data.eval_split)
    return True


def lines(found: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The same for the terminal."""
    said: list[str] = []
    for kind, values in found.items():
        for number, (key, value) in enumerate(values.items()):
            first = kind if number == 0 else ""
            text = value if isinstance(value, str) else shown(value)
            said.append(f"{first:9}{key} = {text}")
    return said
