"""How each tracker is spoken to. A package is imported when its tracker is opened, and no earlier.

Trackers read their own environment variables: WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME, TRACKIO_SPACE_ID and so on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sftx.settings.flat import flat
from sftx.settings.schema import Tracker
from sftx.types import Json

if TYPE_CHECKING:
    from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

Settings = Mapping[str, Json]
"""Nested settings and facts of a run."""
Sample = Mapping[str, Any]
"""An answer of the model: a line of samples.jsonl."""
COLUMNS = ("prompt", "output", "reference", "ended", "tokens")
"""What trackers show of a sample, with its scores behind it."""
PROJECT = "sftx"
"""Where runs are filed, where nothing else is said."""


@dataclass(frozen=True)
class Card:
    """What trackers are told of a run. `id`: what they know it by, also when it is continued."""

    id: str
    folder: Path
    name: str
    settings: Settings
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    logs: str | None = None  # folder of what the tracker itself writes


class Client(Protocol):
    """One tracker that takes one run."""

    def add(self, step: int, numbers: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Take what is known of a step; later ones come later."""
        ...

    def flush(self) -> None:
        """Bring what was added to where the tracker shows it."""
        ...

    def close(self, status: str) -> None:
        """End with the `status` that run.json has."""
        ...


def open_client(name: Tracker, card: Card) -> Client:
    """Start the run in a tracker, or continue it."""
    match name:
        case "tensorboard":
            return TensorBoard(card)
        case "wandb":
            return WeightsAndBiases(card)
        case "mlflow":
            return Mlflow(card)
        case "trackio":
            return Trackio(card)


def table_of(samples: Sequence[Sample]) -> tuple[list[str], list[list[object]]]:
    """Names of the columns, and rows: answers with their scores."""
    scores: dict[str, None] = {}
    for sample in samples:
        scores |= dict.fromkeys(sample.get("scores", {}))
    rows = []
    for sample in samples:
        given = sample.get("scores", {})
        row = [sample.get(name) for name in COLUMNS]
        row += [given.get(name) for name in scores]
        rows.append(row)
    return [*COLUMNS, *scores], rows


class TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir RUNS`."""

    def __init__(self, card: Card) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(card.logs or str(card.folder / "tensorboard"))
        settings = json.dumps(card.settings, indent=2, default=str)
        self.writer.add_text("settings", _code(settings), 0)

    def add(self, step: int, numbers: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Scalars, and samples as text."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        if samples:
            columns, rows = table_of(samples)
            shown = []
            for row in rows:
                named = dict(zip(columns, row, strict=True))
                shown.append(json.dumps(named, ensure_ascii=False, indent=1))
            self.writer.add_text("samples", _code("\n".join(shown)), step)

    def flush(self) -> None:
        """Write to the event file."""
        self.writer.flush()

    def close(self, status: str) -> None:
        """Close the event file."""
        self.writer.close()


def _code(text: str) -> str:
    """`text` for TensorBoard, which reads Markdown: shown as it stands."""
    return "\n".join("    " + line for line in text.splitlines())


class _WithTables:
    """A tracker that shows tables and sends by itself: its package, and the run there."""

    package: Any
    run: Any

    def add(self, step: int, numbers: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Numbers, and samples as a table."""
        logged: dict[str, object] = dict(numbers)
        if samples:
            columns, rows = table_of(samples)
            logged["samples"] = self.package.Table(columns=columns, data=rows)
        self.run.log(logged, step=step)

    def flush(self) -> None:
        """Nothing to do: a process or a thread of the tracker sends."""


class WeightsAndBiases(_WithTables):
    """A run of wandb. What it keeps on disk goes where wandb's own settings say, and not into the
    run folder: it holds links to elsewhere, which a run that is continued would refuse.
    """

    def __init__(self, card: Card) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.package = wandb
        self.run = wandb.init(
            project=card.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            entity=card.entity,
            name=card.name,
            group=card.group,
            tags=card.tags,
            dir=card.logs,
            config=dict(card.settings),
            id=card.id,
            resume="allow",
        )

    def close(self, status: str) -> None:
        """Wait until all is sent; a run that did not finish is shown as failed."""
        self.run.finish(exit_code=int(status != "finished"))


class Mlflow:
    """A run of MLflow, found again by the tag `sftx.id`."""

    def __init__(self, card: Card) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self.client = MlflowClient()
        self.waiting: list[Metric] = []
        name = card.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        found = self.client.search_runs([number], f"tags.`sftx.id` = '{card.id}'")
        if found:
            self.run_id = found[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            tags = {"sftx.id": card.id, "sftx.folder": str(card.folder.resolve())}
            run = self.client.create_run(number, tags=tags, run_name=card.name)
            self.run_id = run.info.run_id
            self._add_params(card.settings)

    def _add_params(self, settings: Settings) -> None:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        params = [Param(key, str(value)[:500]) for key, value in flat(settings).items()]
        for start in range(0, len(params), 100):  # as many as it takes at once
            self.client.log_batch(self.run_id, params=params[start : start + 100])

    def add(self, step: int, numbers: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Numbers wait for `flush`; samples are an artifact, samples/STEP.jsonl."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(1000 * time.time())
        for name, value in numbers.items():
            self.waiting.append(Metric(name, value, now, step))
        if samples:
            lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
            text = "\n".join(lines) + "\n"
            self.client.log_text(self.run_id, text, f"samples/{step:06d}.jsonl")

    def flush(self) -> None:
        """Hand over what waits."""
        for start in range(0, len(self.waiting), 1000):  # as many as it takes at once
            self.client.log_batch(self.run_id, metrics=self.waiting[start : start + 1000])
        self.waiting = []

    def close(self, status: str) -> None:
        """Say how the run ended."""
        endings = {"finished": "FINISHED", "stopped": "KILLED"}
        self.client.set_terminated(self.run_id, endings.get(status, "FAILED"))


class Trackio(_WithTables):
    """A run of Trackio: on this machine, or in the space that its environment variables name."""

    def __init__(self, card: Card) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.package = trackio
        self.run = trackio.init(
            project=card.project or os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=f"{card.name}-{card.id}",  # it knows a run by its name
            group=card.group,
            config=json.loads(json.dumps(card.settings, default=str)),
            resume="allow",
            embed=False,
        )

    def close(self, status: str) -> None:
        """Wait until all is written."""
        self.run.finish()
