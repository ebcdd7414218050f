"""`train.tracker`: wandb, tensorboard, or none. metrics.jsonl is written in any case."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

from sftx.compat.trlx.data.configs import TRLConfig
from sftx.types import UserError

Log = Callable[[dict[str, Any], int], None]


def tracker(config: TRLConfig) -> AbstractContextManager[Log]:
    """The tracker that `config` names: entered, it starts and gives a function that logs numbers at
    a step.
    """
    name = config.train.tracker
    if name not in ("wandb", "tensorboard", None):
        raise UserError(f"train.tracker: found {name!r}; wandb, tensorboard or None")
    if name is None:
        return nullcontext(_nothing)
    if find_spec(name) is not None:
        return _wandb(config) if name == "wandb" else _tensorboard(config)
    if name == "tensorboard":
        raise UserError(
            "train.tracker: tensorboard is not installed; install it, or set tracker to None"
        )
    # The default of every configuration: that it is named does not mean that it is wanted.
    warnings.warn(
        "train.tracker is 'wandb', which is not installed: nothing is sent anywhere", stacklevel=2
    )
    return nullcontext(_nothing)


def _nothing(numbers: dict[str, Any], step: int) -> None:
    """Log nowhere."""


@contextmanager
def _wandb(config: TRLConfig) -> Iterator[Log]:
    import wandb  # pyright: ignore[reportMissingImports]

    train = config.train
    about = {
        "entity": train.entity_name,
        "group": train.group_name,
        "tags": train.tags,
        "dir": train.logging_dir,
    }
    with wandb.init(
        project=train.project_name, name=train.run_name, config=config.to_dict(), **about
    ) as run:
        yield lambda numbers, step: run.log(numbers, step=step)


@contextmanager
def _tensorboard(config: TRLConfig) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    folder = config.train.logging_dir or f"{config.train.checkpoint_dir}/tensorboard"
    with SummaryWriter(folder) as writer:

        def log(numbers: dict[str, Any], step: int) -> None:
            for key, number in numbers.items():
                if number is not None:
                    writer.add_scalar(key, number, step)

        yield log
