"""From trlx's configuration to sftx's.

Two things are functions here, as sftx's settings do not have them: other optimizers, and trlx's
learning rates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch

from sftx.compat.trlx.data.configs import OptimizerConfig, SchedulerConfig, TRLConfig
from sftx.compat.trlx.names import StandIn, refuse
from sftx.model.folder import load_config
from sftx.settings.keywords import AdapterSettings
from sftx.settings.make import make_config
from sftx.settings.schema import Config, Model
from sftx.types import UserError

RUN_FOLDER = "sftx"
"""Where the record of the run is inside `train.checkpoint_dir`."""
_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers (torchrun, accelerate, MPI) say how many processes there are."""
_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
_ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
"""The arguments of adamw, with torch's defaults."""
_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
_ABOUT_PEFT = (
    "peft_type",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "peft_version",
)
"""Fields of a peft configuration that change nothing in training."""


def to_config(config: TRLConfig, rows: list[dict[str, list[int]]]) -> Config:
    """The sftx run that `config` describes, over `rows` of final `input_ids` and `labels`."""
    train = config.train
    model = config.model
    tokenizer = config.tokenizer.tokenizer_path
    unfrozen = model.num_layers_unfrozen
    minibatch = train.minibatch_size
    longest = max(len(row["input_ids"]) for row in rows)
    all_steps = math.ceil(train.epochs * len(rows) / train.batch_size)
    decay = _ADAMW["weight_decay"] if _name(config.optimizer.name) == "adamw" else 0.0
    known = {**_ADAMW, "weight_decay": decay, **config.optimizer.kwargs}
    return make_config(
        model={
            "path": model.model_path,
            "tokenizer": None if tokenizer == model.model_path else tokenizer,
            "trust_remote_code": trusted(model.model_extra_configs),
            "unfrozen_layers": None if unfrozen == -1 else unfrozen,
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
            "steps": min(train.total_steps, all_steps),
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
        checkpoint={"every": 0, "minutes": 0},  # the trainer saves in its own layout
        runtime={"tokens_per_pack": None if minibatch is None else minibatch * longest},
        seed=train.seed,
    )


def refuse_several_processes() -> None:
    """Raise UserError where a launcher has started this script more than once."""
    for name in _PROCESSES:
        count = os.environ.get(name, "1")
        if count.isdigit() and int(count) > 1:
            raise UserError(
                f"{name}={count}: a launcher has started this script in {count} processes, and a "
                "trlx script trains in one. Start it as `python script.py`; or train its samples "
                "on all processes with `torchrun -m sftx train run.yaml`, and then run metric_fn "
                "on the result: docs/migrating-from-trlx.md, 'Several processes', has both steps"
            )


def refuse_untranslatable(config: TRLConfig) -> None:
    """Raise UserError for what `config` asks for and sftx does not do."""
    model = config.model
    train = config.train
    generation = vars(config.method).get("gen_kwargs", {})
    if isinstance(config.method, StandIn):
        refuse(f"method {type(config.method).__name__}", config.method.INSTEAD)
    problems = [
        (
            not isinstance(model.model_path, str),
            "model.model_path: a folder or a name is needed; sftx does not start from random "
            "weights",
        ),
        (
            model.model_arch_type != "causal",
            f"model.model_arch_type: found {model.model_arch_type!r}; trlx's SFT trainer loads "
            "causal models only, so does sftx",
        ),
        (
            model.delta_kwargs is not None,
            "model.delta_kwargs: OpenDelta is not used here; write the same as model.peft_config",
        ),
        (
            model.peft_config is not None and model.num_layers_unfrozen != -1,
            "model.num_layers_unfrozen: set it to -1 with a peft_config, which freezes all but "
            "the adapter",
        ),
        (
            train.minibatch_size and train.batch_size % train.minibatch_size,
            f"train.minibatch_size: {train.minibatch_size} must divide train.batch_size, "
            f"{train.batch_size}",
        ),
        (
            train.rollout_logging_dir is not None,
            "train.rollout_logging_dir: there are no rollouts in supervised fine-tuning",
        ),
        (
            generation.get("num_return_sequences", 1) != 1,
            "method.gen_kwargs: num_return_sequences: an evaluation takes one answer to each prompt",
        ),
        (
            train.tracker not in ("wandb", "tensorboard", None),
            f"train.tracker: found {train.tracker!r}; wandb, tensorboard or None",
        ),
        (
            train.tracker == "tensorboard" and find_spec("tensorboard") is None,
            "train.tracker: tensorboard is not installed; install it, or set tracker to None",
        ),
    ]
    for is_wrong, message in problems:
        if is_wrong:
            raise UserError(message)
    only = {"trust_remote_code"}
    _refuse_others("model.model_extra_configs", model.model_extra_configs, only)
    extra = config.tokenizer.tokenizer_extra_configs
    _refuse_others("tokenizer.tokenizer_extra_configs", extra, only)
    learning_rate(config.scheduler, 1.0)


def _refuse_others(section: str, given: Mapping[str, object], known: set[str]) -> None:
    odd = sorted(set(given) - known)
    if odd:
        raise UserError(
            f"{section}: {', '.join(odd)} is not understood; known: {', '.join(sorted(known))}"
        )


def trusted(extra: Mapping[str, object]) -> bool:
    """Whether code that comes with the model or the tokenizer may run."""
    return bool(extra.get("trust_remote_code"))


def _adapter(config: TRLConfig) -> AdapterSettings:
    """sftx's adapter settings for a peft configuration, given as a dictionary or as an object."""
    given = config.model.peft_config
    if given is None:
        return {}
    from peft import LoraConfig

    values = dict(given) if isinstance(given, dict) else given.to_dict()
    kind = _name(values.get("peft_type"))
    if kind.upper() != "LORA":
        raise UserError(f"model.peft_config: peft_type {kind} is not offered; LORA is")
    default = LoraConfig().to_dict()
    _check_peft(values, default)
    values = {**default, **values}
    alpha = float(values["lora_alpha"])
    if values["use_dora"] and values["use_rslora"]:  # peft then scales by alpha / sqrt(r)
        alpha *= math.sqrt(values["r"])
    targets = values["target_modules"] or _default_targets(config)
    return {
        "method": _method(values),
        "rank": values["r"],
        "alpha": alpha,
        "dropout": float(values["lora_dropout"]),
        "targets": targets if isinstance(targets, str) else sorted(targets),
    }


def _check_peft(values: Mapping[str, object], default: Mapping[str, object]) -> None:
    """UserError where a peft configuration asks for what sftx does not do."""
    for key, value in values.items():
        if key not in (*_LORA, *_ABOUT_PEFT) and value != default.get(key):
            raise UserError(
                f"model.peft_config: {key}={value!r} is not understood; {', '.join(_LORA)} are"
            )


def _method(values: Mapping[str, object]) -> Literal["lora", "rslora", "dora"]:
    if values["use_dora"]:
        return "dora"
    return "rslora" if values["use_rslora"] else "lora"


def _default_targets(config: TRLConfig) -> list[str]:
    """The modules that peft adapts in a model of this type where none are named."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    trust = trusted(config.model.model_extra_configs)
    kind = load_config(Model(path=config.model.model_path, trust_remote_code=trust)).model_type
    if kind not in TARGETS:
        raise UserError(
            f"model.peft_config: target_modules must be given for a model of type {kind}"
        )
    return TARGETS[kind]


def _name(given: object) -> str:
    """The name that an enumeration's member or a text gives."""
    return str(getattr(given, "value", given))


def learning_rate(scheduler: SchedulerConfig, peak: float) -> Callable[[int], float]:
    """The learning rate of update `step` (0-based), as torch's scheduler of this name has it."""
    known: dict[str, dict[str, float]] = {
        "cosine_annealing": {"T_max": 0, "eta_min": 0},
        "linear": {"start_factor": 1 / 3, "end_factor": 1, "total_iters": 5},
    }
    name = _name(scheduler.name)
    if name not in known:
        raise UserError(f"scheduler.name: {name!r} is not offered; {' and '.join(known)} are")
    _refuse_others("scheduler.kwargs", scheduler.kwargs, set(known[name]))
    given = {**known[name], **scheduler.kwargs}
    values = {key: float(value) for key, value in given.items()}
    if values.get("T_max") == 0:
        raise UserError(
            "scheduler.kwargs: cosine_annealing needs T_max, the number of steps to its lowest "
            "point"
        )

    def cosine(step: int) -> float:
        low = values["eta_min"]
        return low + (peak - low) * (1 + math.cos(math.pi * step / values["T_max"])) / 2

    def linear(step: int) -> float:
        first = values["start_factor"]
        total = values["total_iters"]
        return peak * (first + (values["end_factor"] - first) * min(step, total) / total)

    return cosine if name == "cosine_annealing" else linear


def optimizer(config: OptimizerConfig, ours: torch.optim.AdamW) -> torch.optim.AdamW:
    """`ours` for adamw, else torch's adam or sgd over the same groups of parameters.

    The groups have weight decay on matrices only.
    """
    name = _name(config.name)
    if name not in _OPTIMIZERS:
        raise UserError(f"optimizer.name: {name!r} is not offered; use adamw, adam or sgd")
    if name == "adamw":
        _refuse_others("optimizer.kwargs", config.kwargs, set(_ADAMW))
        return ours
    kwargs = {"lr": _ADAMW["lr"], **config.kwargs}
    kwargs.pop("weight_decay", None)  # in the groups
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in ours.param_groups
    ]
    try:
        made = _OPTIMIZERS[name](groups, **kwargs, fused=True)  # pyright: ignore[reportCallIssue]
    except TypeError as error:
        raise UserError(f"optimizer.kwargs: {error}") from error
    # A step needs no more of it than all fused optimizers have.
    return cast(torch.optim.AdamW, made)
