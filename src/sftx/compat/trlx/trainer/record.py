"""Where the numbers of a run go: its record, and `train.tracker` (wandb, tensorboard, or none)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sftx.compat.trlx.data.configs import TRLConfig
from sftx.model_config import read_json
from sftx.report.record import Run
from sftx.settings.schema import Config
from sftx.training.export import TRLX
from sftx.types import UserError

Log = Callable[[Mapping[str, float | None], int], None]


class TrlxRun(Run):
    """The record of a run that begins anew, or at the step `begin`, whatever is in its folder.

    The lines of earlier steps stay in it. `told` is the script's configuration.
    """

    def __init__(self, config: Config, begin: int, told: Mapping[str, object]) -> None:
        super().__init__(config)
        self.begin = begin
        self.own: dict[str, object] = {TRLX: told}
        if begin and "eval_before" in self.facts:
            self.own["eval_before"] = self.facts["eval_before"]
        self.facts = {}  # an earlier run neither forbids this one nor finishes it

    def start(self, step: int, carried: Mapping[str, str], **facts: Any) -> None:
        """Begin the record with the lines that are in the folder up to the step `begin`."""
        super().start(step, self.records_until(self.begin), **facts, **self.own)


def refuse_foreign_folder(folder: Path) -> None:
    """UserError unless the folder is empty, or holds the record of a trlx script's run."""
    path = folder / "run.json"
    if path.is_file() and TRLX in read_json(path):
        return
    is_file = folder.exists() and not folder.is_dir()
    found = folder.iterdir() if folder.is_dir() else ()
    if is_file or any(not path.name.startswith(".") for path in found):
        raise UserError(
            f"train.checkpoint_dir: the record of the run would go to {folder}, which holds "
            "something else; choose another checkpoint_dir"
        )


@contextmanager
def tracker(config: TRLConfig) -> Iterator[Log]:
    """Start the tracker that `config` names; inside, a function logs numbers at a step."""
    train = config.train
    if train.tracker == "wandb" and find_spec("wandb") is not None:
        import wandb  # pyright: ignore[reportMissingImports]

        with wandb.init(
            project=train.project_name,
            name=train.run_name,
            entity=train.entity_name,
            group=train.group_name,
            tags=train.tags,
            dir=train.logging_dir,
            config=config.to_dict(),
        ) as run:
            yield lambda numbers, step: run.log(numbers, step=step)
    elif train.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(train.logging_dir or f"{train.checkpoint_dir}/tensorboard") as writer:

            def log(numbers: Mapping[str, float | None], step: int) -> None:
                for key, number in numbers.items():
                    if number is not None:
                        writer.add_scalar(key, number, step)

            yield log
    else:
        if train.tracker == "wandb":
            # The default of every configuration: that it is named does not mean that it is wanted.
            warnings.warn(
                "train.tracker is 'wandb', which is not installed: nothing is sent anywhere",
                stacklevel=2,
            )
        yield lambda numbers, step: None
