"""From trlx's configuration to sftx's, and the two things sftx's settings do not name: other
optimizers, and trlx's learning-rate schedules as functions of the step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig

from sftx.compat.trlx.data.configs import OptimizerConfig, SchedulerConfig, TRLConfig
from sftx.compat.trlx.rl import StandIn, refuse
from sftx.settings.keywords import AdapterSettings
from sftx.settings.load import make_config
from sftx.settings.schema import Config
from sftx.types import UserError

RUN_FOLDER = "sftx"
"""Where the record of the run stands inside `train.checkpoint_dir`."""
_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers (torchrun, accelerate, MPI) say how many processes there are."""
_TORCH_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def to_config(config: TRLConfig, rows: list[dict[str, list[int]]]) -> Config:
    """The sftx run that `config` describes, over `rows` of final `input_ids` and `labels`."""
    train, model = config.train, config.model
    longest = max(len(row["input_ids"]) for row in rows)
    decay = 0.01 if config.optimizer.name == "adamw" else 0.0  # torch's own defaults
    known = {**_TORCH_DEFAULTS, "weight_decay": decay, **config.optimizer.kwargs}
    tokenizer = config.tokenizer.tokenizer_path
    return make_config(
        model={
            "path": model.model_path,
            "tokenizer": None if tokenizer == model.model_path else tokenizer,
            "trust_remote_code": bool(model.model_extra_configs.get("trust_remote_code", False)),
            "unfrozen_layers": None
            if model.num_layers_unfrozen == -1
            else model.num_layers_unfrozen,
        },
        data={
            "rows": rows,
            "format": "tokens",
            "max_length": longest,
            "too_long": "error",
            "workers": 0,
        },
        output=str(Path(train.checkpoint_dir) / RUN_FOLDER),
        batch={
            "examples_per_step": train.batch_size,
            "steps": min(train.total_steps, math.ceil(train.epochs * len(rows) / train.batch_size)),
        },
        optim={
            "learning_rate": float(known["lr"]),
            "schedule": "constant",
            "warmup": 0,
            "weight_decay": float(known["weight_decay"]),
            "betas": tuple(known["betas"]),
            "eps": float(known["eps"]),
            "max_grad_norm": 0,
        },
        adapter=_adapter(config),
        runtime={}
        if train.minibatch_size is None
        else {"tokens_per_pack": train.minibatch_size * longest},
        seed=train.seed,
    )


def refuse_several_processes() -> None:
    """Raise UserError where a launcher has started this script more than once."""
    for name in _PROCESSES:
        count = os.environ.get(name, "1")
        if count.isdigit() and int(count) > 1:
            raise UserError(
                f"{name}={count}: a launcher has started this script in {count} processes, and a "
                "trlx script trains in "
                "one. Start it as `python script.py`; or train its samples on all processes with "
                "`torchrun -m sftx "
                "train run.yaml`, and then run metric_fn on the result: "
                "docs/migrating-from-trlx.md, 'Several "
                "processes', has both steps"
            )


def refuse_untranslatable(config: TRLConfig) -> None:
    """Raise UserError for what `config` asks for and sftx does not do."""
    model, train = config.model, config.train
    if isinstance(config.method, StandIn):
        refuse(f"method {type(config.method).__name__}", config.method.INSTEAD)
    if not isinstance(model.model_path, str):
        raise UserError(
            "model.model_path: a folder or a name is needed; sftx does not start from random "
            "weights"
        )
    if model.model_arch_type != "causal":
        raise UserError(
            f"model.model_arch_type: found {model.model_arch_type!r}; trlx's SFT trainer loads "
            "causal models only, so "
            "does sftx"
        )
    if model.delta_kwargs is not None:
        raise UserError(
            "model.delta_kwargs: OpenDelta is not used here; write the same as model.peft_config"
        )
    if model.peft_config is not None and model.num_layers_unfrozen != -1:
        raise UserError(
            "model.num_layers_unfrozen: set it to -1 with a peft_config, which freezes all but "
            "the adapter"
        )
    for name, extra in (
        ("model.model_extra_configs", model.model_extra_configs),
        ("tokenizer.tokenizer_extra_configs", config.tokenizer.tokenizer_extra_configs),
    ):
        for key in set(extra) - {"trust_remote_code"}:
            raise UserError(f"{name}: {key} is not understood; only trust_remote_code is")
    if train.minibatch_size and train.batch_size % train.minibatch_size:
        raise UserError(
            f"train.minibatch_size: {train.minibatch_size} must divide train.batch_size, "
            f"{train.batch_size}"
        )
    learning_rate(config.scheduler, 1.0)
    if train.rollout_logging_dir is not None:
        raise UserError(
            "train.rollout_logging_dir: there are no rollouts in supervised fine-tuning"
        )


def _adapter(config: TRLConfig) -> AdapterSettings:
    """sftx's adapter settings for a peft configuration, given as a dictionary or as an object."""
    given = config.model.peft_config
    if given is None:
        return {}
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

    values = dict(given) if isinstance(given, dict) else given.to_dict()
    kind = str(getattr(values.get("peft_type"), "value", values.get("peft_type")))
    if kind.upper() != "LORA":
        raise UserError(f"model.peft_config: peft_type {kind} is not offered; LORA is")
    default = LoraConfig().to_dict()
    understood = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    for key, value in values.items():
        about_peft = key in (
            "peft_type",
            "task_type",
            "inference_mode",
            "base_model_name_or_path",
            "peft_version",
        )
        if key not in understood and not about_peft and value != default.get(key):
            raise UserError(
                f"model.peft_config: {key}={value!r} is not understood; {', '.join(understood)} are"
            )
    targets = values.get("target_modules")
    if targets is None:
        kind = AutoConfig.from_pretrained(config.model.model_path).model_type
        if kind not in PEFT_TARGETS:
            raise UserError(
                f"model.peft_config: target_modules must be given for a model of type {kind}"
            )
        targets = PEFT_TARGETS[kind]
    merged = {**default, **values}
    return {
        "method": "dora" if merged["use_dora"] else "rslora" if merged["use_rslora"] else "lora",
        "rank": merged["r"],
        "alpha": float(merged["lora_alpha"]),
        "dropout": float(merged["lora_dropout"]),
        "targets": targets if isinstance(targets, str) else sorted(targets),
    }


def learning_rate(scheduler: SchedulerConfig, peak: float) -> Callable[[int], float]:
    """The learning rate of update `step` (0-based), as torch's schedulers of these names compute
    it.
    """
    kwargs = dict(scheduler.kwargs)
    match str(getattr(scheduler.name, "value", scheduler.name)):
        case "cosine_annealing":
            if "T_max" not in kwargs:
                raise UserError(
                    "scheduler.kwargs: cosine_annealing needs T_max, the number of steps to its "
                    "lowest point"
                )
            period, low = float(kwargs.pop("T_max")), float(kwargs.pop("eta_min", 0.0))
            rate = lambda step: low + (peak - low) * (1 + math.cos(math.pi * step / period)) / 2  # noqa: E731
        case "linear":
            first, last = (
                float(kwargs.pop("start_factor", 1 / 3)),
                float(kwargs.pop("end_factor", 1.0)),
            )
            total = int(kwargs.pop("total_iters", 5))
            rate = lambda step: peak * (first + (last - first) * min(step, total) / total)  # noqa: E731
        case name:
            raise UserError(
                f"scheduler.name: {name!r} is not offered; cosine_annealing and linear are"
            )
    if kwargs:
        raise UserError(
            f"scheduler.kwargs: {', '.join(kwargs)} is not understood for {scheduler.name}"
        )
    return rate


def optimizer(config: OptimizerConfig, ours: torch.optim.AdamW) -> torch.optim.AdamW:
    """`ours` for adamw; for adam and sgd, theirs over the same groups of parameters (weight decay
    on matrices only).
    """
    kwargs = dict(config.kwargs)
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in ours.param_groups
    ]
    kinds: dict[str, type[torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
    }
    match str(getattr(config.name, "value", config.name)):
        case "adamw":
            if odd := set(kwargs) - {"lr", "betas", "eps", "weight_decay"}:
                raise UserError(
                    f"optimizer.kwargs: {', '.join(sorted(odd))} is not understood for adamw"
                )
            return ours
        case "adam" | "sgd" as name:
            kwargs.pop("weight_decay", None)  # in the groups
            try:
                made = kinds[name](groups, **{"lr": _TORCH_DEFAULTS["lr"], **kwargs}, fused=True)  # pyright: ignore[reportCallIssue]
            except TypeError as error:
                raise UserError(f"optimizer.kwargs: {error}") from error
            return cast(
                torch.optim.AdamW, made
            )  # the step needs only what all fused optimizers have
        case "adam_8bit_bnb" | "adamw_8bit_bnb" as name:
            raise UserError(f"optimizer.name: {name} is not offered; use {name.partition('_')[0]}")
        case name:
            raise UserError(f"optimizer.name: {name!r} is not offered; adam, adamw and sgd are")
