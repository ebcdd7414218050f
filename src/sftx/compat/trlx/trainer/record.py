"""Where the numbers of a run go: its record, and `train.tracker` (wandb, tensorboard, or none)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from sftx.compat.trlx.data.configs import TRLConfig
from sftx.model_config import read_json
from sftx.report.facts import RunFacts
from sftx.report.record import RECORDS, Run, read_lines
from sftx.report.tracker_clients import Card
from sftx.report.trackers import Record, tracking
from sftx.settings.schema import Config
from sftx.training.export import TRLX
from sftx.types import UserError


class TrlxRun(Run):
    """The record of a run that begins anew, or at the step `begin`, whatever is in its folder.

    The lines of earlier steps stay in it. `told` is the script's configuration.
    """

    def __init__(self, config: Config, begin: int, told: Mapping[str, object]) -> None:
        super().__init__(config)
        self.begin = begin
        self.told = dict(told)
        self.eval_before = self.facts.eval_before if begin else None
        self.id = self.facts.tracker_id if begin else ""
        self.facts = RunFacts()  # an earlier run neither forbids this one nor finishes it

    def start(self, step: int, carried: Mapping[str, str], facts: RunFacts) -> None:
        """Begin the record with the lines that are in the folder up to the step `begin`."""
        own = replace(facts, trlx=self.told, eval_before=self.eval_before, tracker_id=self.id)
        super().start(step, self._records_so_far(), own)

    def _records_so_far(self) -> dict[str, str]:
        """The records with the lines of steps up to `begin` alone."""
        found: dict[str, str] = {}
        for name in RECORDS:
            lines = [line for line in read_lines(self.folder / name) if line["step"] <= self.begin]
            found[name] = "".join(json.dumps(line) + "\n" for line in lines)
        return found


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


def tracked(
    config: TRLConfig, run: Run, say: Callable[[str], None]
) -> AbstractContextManager[None]:
    """Hand over what `run` writes to the tracker that `config` names, under trlx's names."""
    train = config.train
    if train.tracker == "wandb" and find_spec("wandb") is None:
        # The default of every configuration: that it is named does not mean that it is wanted.
        warnings.warn(
            "train.tracker is 'wandb', which is not installed: nothing is sent anywhere",
            stacklevel=2,
        )
    elif train.tracker == "wandb" or train.tracker == "tensorboard":
        folder = Path(train.checkpoint_dir)
        logs = str(folder / "tensorboard") if train.tracker == "tensorboard" else None
        card = Card(
            id="",
            folder=run.folder,
            name=train.run_name or folder.name,
            settings=config.to_dict(),
            project=train.project_name,
            entity=train.entity_name,
            group=train.group_name,
            tags=train.tags or [],
            logs=train.logging_dir or logs,
        )
        return tracking(run, train.tracker, say, card, _numbers_of)
    return nullcontext()


def _numbers_of(record: Record) -> dict[str, float]:
    """The numbers of a record as trlx names them."""
    numbers: dict[str, float | None] = dict(record["eval"] or {})
    if record["step"] > 0:
        numbers["loss"] = record["loss"]
        numbers["learning_rate_group_0"] = record["learning_rate"]
    return {name: value for name, value in numbers.items() if value is not None}
