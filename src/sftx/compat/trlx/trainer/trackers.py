"""`train.tracker`: wandb, tensorboard, or none. metrics.jsonl is written in any case."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from sftx.compat.trlx.data.configs import TRLConfig
from sftx.types import UserError

Log = Callable[[dict[str, Any], int], None]


@contextmanager
def tracker(config: TRLConfig) -> Iterator[Log]:
    """A function that logs numbers at a step."""
    train, name = config.train, config.train.tracker
    if name not in ("wandb", "tensorboard", None):
        raise UserError(f"train.tracker: found {name!r}; wandb, tensorboard or None")
    installed = name is not None and find_spec(name) is not None
    if name == "tensorboard" and not installed:
        raise UserError("train.tracker: tensorboard is not installed; install it, or set tracker to None")
    if name == "wandb" and not installed:
        # The default of every configuration: that it is named does not mean that it is wanted.
        warnings.warn("train.tracker is 'wandb', which is not installed: nothing is sent anywhere", stacklevel=2)
    if not installed:
        yield lambda numbers, step: None
    elif name == "wandb":
        import wandb  # pyright: ignore[reportMissingImports]

        about = {"entity": train.entity_name, "group": train.group_name, "tags": train.tags, "dir": train.logging_dir}
        with wandb.init(project=train.project_name, name=train.run_name, config=config.to_dict(), **about) as run:
            yield lambda numbers, step: run.log(numbers, step=step)
    else:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(train.logging_dir or f"{train.checkpoint_dir}/tensorboard") as writer:

            def log(numbers: dict[str, Any], step: int) -> None:
                for key, number in numbers.items():
                    if number is not None:
                        writer.add_scalar(key, number, step)

            yield log
