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
    train = config.train
    match train.tracker:
        case "wandb" if find_spec("wandb") is None:
            # The default of every configuration: that it is named does not mean that it is wanted.
            warnings.warn("train.tracker is 'wandb', which is not installed: nothing is sent anywhere", stacklevel=2)
            yield lambda numbers, step: None
        case "wandb":
            import wandb  # pyright: ignore[reportMissingImports]

            run = wandb.init(
                project=train.project_name,
                name=train.run_name,
                entity=train.entity_name,
                group=train.group_name,
                tags=train.tags,
                dir=train.logging_dir,
                config=config.to_dict(),
            )
            try:
                yield lambda numbers, step: run.log(numbers, step=step)
            finally:
                run.finish()
        case "tensorboard":
            if find_spec("tensorboard") is None:
                raise UserError("train.tracker: tensorboard is not installed; install it, or set tracker to None")
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(train.logging_dir or f"{train.checkpoint_dir}/tensorboard") as writer:

                def log(numbers: dict[str, Any], step: int) -> None:
                    for name, number in numbers.items():
                        if number is not None:
                            writer.add_scalar(name, number, step)

                yield log
        case None:
            yield lambda numbers, step: None
        case other:
            raise UserError(f"train.tracker: found {other!r}; wandb, tensorboard or None")
