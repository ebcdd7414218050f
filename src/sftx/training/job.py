"""A run that is ready to take steps, and what can be asked of it between two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftx import distributed
from sftx.data.encoder import Encoder
from sftx.data.pack import build_pack
from sftx.data.plan import Plan
from sftx.data.store.corpus import Corpus
from sftx.eval.loss import held_out_loss
from sftx.model.adapter import trainable
from sftx.model.pack_loss import PackLoss, TensorPack, to_tensors
from sftx.model.runtime import Machine
from sftx.report.record import Run
from sftx.settings.schema import Config
from sftx.training import checkpoint
from sftx.training.async_writer import AsyncWriter
from sftx.training.signals import StopFlag


@dataclass(frozen=True, slots=True)
class StepPacks:
    """The packs of a step."""

    own: list[TensorPack]  # of this rank, on their way to the device
    count: int  # of all ranks, those that hold nothing left out


@dataclass
class Job:
    """All that the steps of a run need."""

    config: Config
    machine: Machine
    run: Run
    stop: StopFlag
    encoder: Encoder
    corpus: Corpus
    held_out: Corpus | None
    plan: Plan
    tokens_per_pack: int
    loss: PackLoss
    adapted: PeftModel | None
    tokenizer: PreTrainedTokenizerBase  # the one that is saved with the model
    save_dtype: torch.dtype  # in which whole models are written
    optimizer: torch.optim.AdamW
    learning_rate: Callable[[int], float]  # of update `step` (0-based)
    state: checkpoint.State  # where the run stands: the steps whose records were read
    predicted_seconds: float | None  # of all steps
    tell: Callable[[str, int, int], None]  # what is being done, and how much of it is done
    writer: AsyncWriter = field(default_factory=AsyncWriter)
    peak_memory: int | None = None  # bytes, once a step was taken

    @property
    def trained(self) -> PreTrainedModel | PeftModel:
        """What is saved: the adapter where there is one, else the model."""
        return self.loss.model if self.adapted is None else self.adapted

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.run.folder / "checkpoints"

    def hand_over(self) -> None:
        """Make the model one that answers, with its own attention and without dropout."""
        self.loss.use_segments(False)
        self.loss.eval()
        self.loss.model.config.use_cache = True

    def take_back(self) -> None:
        """Make it one that trains again."""
        self.loss.model.config.use_cache = False
        self.loss.train()
        self.loss.use_segments(True)

    def packs(self, step: int) -> StepPacks:
        """The packs of `step` (0-based)."""
        ranks = self.plan.packs(step, self.tokens_per_pack, distributed.world_size())
        own: list[TensorPack] = []
        for members in ranks[distributed.rank()]:
            pack = build_pack([self.corpus.example(i) for i in members], members)
            own.append(to_tensors(pack, self.machine.device))
        return StepPacks(own, sum(map(bool, chain(*ranks))))

    def evaluate(self) -> dict[str, float]:
        """Held-out numbers of the model as it is; {} where a signal cut the evaluation short."""
        assert self.held_out is not None
        return held_out_loss(
            self.loss,
            self.held_out,
            self.tokens_per_pack,
            self.machine.autocast,
            self.stop,
            partial(self.tell, "evaluating|packs"),
        )

    def save(
        self,
        evaluated: dict[str, float] | None,
        in_background: bool = False,
        optional: bool = False,
    ) -> Path:
        """Write a checkpoint of the model as it is, with its held-out numbers; see
        `checkpoint.save`.
        """
        self.tell("saving a checkpoint", 0, 0)
        return checkpoint.save(
            self.checkpoints,
            replace(self.state, held_out_loss=evaluated["loss"] if evaluated else None),
            self.loss,
            self.optimizer,
            self.config.checkpoint.keep,
            self.writer if in_background and self.config.checkpoint.background else None,
            self.run.records(),
            optional,
        )

    def no_room(self) -> str:
        """Needed and free space where the disk has no room for the trained model, else empty; the
        same on every rank.
        """
        trained, everything = trainable(self.loss)
        whole = everything * self.save_dtype.itemsize
        needed = whole if self.adapted is None else trained * torch.float32.itemsize
        if self.config.adapter.merge:
            needed += whole
        problem = ""
        if distributed.is_main() and checkpoint.shortage(self.run.folder, needed):
            problem = checkpoint.numbers(self.run.folder, needed)
        return distributed.broadcast(problem)
