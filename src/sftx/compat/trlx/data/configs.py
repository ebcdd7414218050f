"""trlx's configuration: sections as dataclasses, and `TRLConfig` around them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftx.compat.trlx.data.method_configs import (
    MethodConfig,
    Section,
    get_method,
    refuse_unknown,
)
from sftx.settings.read_yaml import parse
from sftx.types import UserError


@dataclass
class ModelConfig(Section):
    """The model: its path, how many of its layers train (-1 = all), and an adapter if any."""

    SECTION = "model"

    model_path: str
    model_arch_type: str = "causal"
    num_layers_unfrozen: int = -1
    peft_config: Any = None
    model_extra_configs: dict[str, Any] = field(default_factory=dict)
    delta_kwargs: dict[str, Any] | None = None


@dataclass
class TokenizerConfig(Section):
    """The tokenizer, and the sides on which it pads prompts and cuts what is too long."""

    SECTION = "tokenizer"

    tokenizer_path: str
    padding_side: str = "left"
    truncation_side: str = "right"
    tokenizer_extra_configs: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizerConfig(Section):
    """Name of the optimizer (adam, adamw, sgd) and its keyword arguments."""

    SECTION = "optimizer"

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class SchedulerConfig(Section):
    """Name of the learning-rate schedule (cosine_annealing, linear) and its keyword arguments."""

    SECTION = "scheduler"

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig(Section):
    """The training job; names and defaults are trlx's."""

    SECTION = "train"

    total_steps: int
    seq_length: int
    epochs: int
    batch_size: int
    checkpoint_interval: int
    eval_interval: int
    pipeline: str
    trainer: str
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)
    project_name: str = "trlx"
    run_name: str | None = None
    entity_name: str | None = None
    group_name: str | None = None
    checkpoint_dir: str = "ckpts"
    rollout_logging_dir: str | None = None
    save_best: bool = True
    save_optimizer: bool = True
    resume_from_checkpoint: str | None = None
    tracker: str | None = "wandb"
    logging_dir: str | None = None
    tags: list[str] | None = field(default_factory=list)
    seed: int = 1000
    minibatch_size: int | None = None


_SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "tokenizer": TokenizerConfig,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "train": TrainConfig,
}


@dataclass
class TRLConfig:
    """The whole configuration."""

    method: MethodConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    tokenizer: TokenizerConfig
    train: TrainConfig

    @classmethod
    def load_yaml(cls, yml_fp: str) -> TRLConfig:
        """Read a YAML file, strictly: `1e-4` is a number, a key may stand once."""
        problems: list[str] = []
        data, _ = parse(Path(yml_fp).read_text(encoding="utf-8"), str(yml_fp), problems)
        if problems:
            raise UserError("\n".join(problems))
        if not isinstance(data, dict):
            raise UserError(
                f"{yml_fp}: a mapping of sections is needed: method, {', '.join(_SECTIONS)}"
            )
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TRLConfig:
        """Construct from nested dictionaries; UserError for a name that is not known."""
        names = ["method", *_SECTIONS]
        refuse_unknown(config, names)
        for name in names:
            if not isinstance(config.get(name), Mapping):
                raise UserError(f"section {name} is missing from the config")
        kind = get_method(str(config["method"].get("name", "")))
        sections = {name: section.from_dict(config[name]) for name, section in _SECTIONS.items()}
        return cls(method=kind.from_dict(config["method"]), **sections)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested dictionaries, independent of this object."""
        return {name: deepcopy(vars(getattr(self, name))) for name in ("method", *_SECTIONS)}

    def evolve(self, **kwargs: Any) -> TRLConfig:
        """A new one with other parameters: `config.evolve(train=dict(batch_size=4))`."""
        return TRLConfig.from_dict(_merged(self.to_dict(), kwargs))

    @classmethod
    def update(cls, baseconfig: TRLConfig | dict[str, Any], config: Mapping[str, Any]) -> TRLConfig:
        """`baseconfig` with other parameters, by dotted keys or nested dictionaries.

        `{"train.batch_size": 4}` is the same as `{"train": {"batch_size": 4}}`. Raises UserError
        for a key that the configuration does not have, at whatever depth.
        """
        merged = baseconfig.to_dict() if isinstance(baseconfig, TRLConfig) else baseconfig
        for name, value in config.items():
            nested = value
            for key in reversed(name.split(".")):
                nested = {key: nested}
            merged = _merged(merged, nested)
        return cls.from_dict(merged)

    def __str__(self) -> str:
        return json.dumps(self.to_dict(), indent=4, default=str)


def _merged(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `update` put in, recursively; neither is changed."""
    merged = deepcopy(dict(base))
    for key, value in update.items():
        inner = merged.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            merged[key] = _merged(inner, value)
        else:
            merged[key] = value
    return merged
