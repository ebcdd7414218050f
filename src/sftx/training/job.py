"""A run that is ready to take steps, and what can be asked of it between two of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftx import distributed
from sftx.data.dataset import write_ledger
from sftx.data.encoder import Encoder
from sftx.data.plan import Plan
from sftx.data.shared_packs import packs_of_step
from sftx.data.store.corpus import Corpus
from sftx.eval.forgetting import read_gauge
from sftx.eval.judge import Judge, Questions
from sftx.eval.loss import held_out_loss
from sftx.model.adapter import trainable
from sftx.model.context_parallel import group_and_count
from sftx.model.pack_loss import PackLoss, TensorPack, to_tensors
from sftx.model.runtime import Machine
from sftx.report.record import Run
from sftx.settings.schema import Config
from sftx.training import checkpoint
from sftx.training.async_writer import AsyncWriter
from sftx.training.best import best_step, chosen_by, costs, without_gain
from sftx.training.memory_plan import Packing
from sftx.training.mirror import GAUGE, Mirror
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
    packing: Packing
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
    mirror: Mirror | None = None  # of the main rank, where there is one
    peak_memory: int | None = None  # bytes, once a step was taken
    judge: Judge | None = None  # where answers are asked for
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict[int, dict[str, float]])
    """The numbers of all evaluations so far, by step."""
    samples: list[dict[str, object]] = field(default_factory=list[dict[str, object]])
    """The lines that the latest evaluation gave samples.jsonl."""

    @property
    def tokens_per_pack(self) -> int:
        """Tokens that a pack may have."""
        return self.packing.tokens_per_pack

    @property
    def trained(self) -> PreTrainedModel | PeftModel:
        """What is saved: the adapter where there is one, else the model."""
        if self.adapted is None:
            return self.loss.model
        return self.adapted

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
        context = self.packing.context
        number, count = group_and_count(context)
        groups, read = packs_of_step(
            self.plan,
            self.corpus,
            step,
            self.tokens_per_pack,
            self.packing.shares_prefixes,
            count,
            self.loss.paths.padded,
        )
        own: list[TensorPack] = []
        for members in groups[number]:
            own.append(to_tensors(members.build(read), self.machine.device, context))
        return StepPacks(own, sum(bool(members.examples) for members in chain(*groups)))

    def ask(self, questions: Questions | None) -> None:
        """Let evaluations ask `questions` too."""
        if questions is not None:
            self.judge = Judge(
                questions, self.loss, self.adapted, self.machine, self.tokens_per_pack
            )

    def write_ledger(self, again: bool) -> list[str]:
        """Write the ledger; with `again` it was written before, and a line says what had to be
        mended.
        """
        if not self.run.writes:
            return []
        names = write_ledger(self.corpus, self.run.folder)
        if not (names and again):
            return []
        return [
            f"{' and '.join(names)} did not hold what this data gives (lost, damaged or older): "
            "written anew"
        ]

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.held_out is not None or self.judge is not None

    def evaluate(self) -> dict[str, float]:
        """Held-out numbers of the model as it is, and those of its answers, which go to
        samples.jsonl; {} where a signal cut the evaluation short.
        """
        step = self.state.step
        numbers: dict[str, float] = {}
        if self.held_out is not None:
            numbers = held_out_loss(
                self.loss,
                self.held_out,
                self.tokens_per_pack,
                self.machine.autocast,
                self.packing.context,
                self.stop,
                partial(self.tell, "evaluating|packs"),
            )
            if not numbers:
                return {}
        if self.judge is not None:
            self.tell("answering the prompts", 0, 0)
            judged = self.judge.ask(self.stop, is_training=True)
            if judged is None:
                return {}
            numbers |= judged.numbers
            self.samples = judged.records(step)
            self.run.write_samples(self.samples, again=step in self.evaluations)
        self.evaluations[step] = numbers
        return numbers

    def remember_base(self) -> None:
        """Let the base answer the prompts, for the distance from it at later evaluations."""
        judge = self.judge
        path = self.checkpoints / GAUGE
        assert judge is not None
        at_start = self.state.step == 0
        if at_start or judge.adapted is not None:
            # The evaluation before the first step needs the same answers, unless an adapter goes on.
            shared = at_start and self.config.eval.at_start and self.config.adapter.path is None
            judge.remember(path, self.stop, shared)
        elif distributed.broadcast(path.exists()):
            judge.gauge = read_gauge(path)
        elif distributed.is_main():
            print(f"warning: there is no {path}: kl is left out", file=sys.stderr)

    @property
    def best_by(self) -> str:
        """The number that tells which evaluation is the best."""
        return chosen_by(self.config.eval) or "loss"

    @property
    def is_best(self) -> bool:
        """Whether the model as it is will be written at the end, unless a better one comes."""
        wanted = chosen_by(self.config.eval)
        return wanted is not None and best_step(self.evaluations, wanted) == self.state.step

    @property
    def gave_up(self) -> str:
        """Why no further step is taken, in words; empty where one is."""
        wanted = self.config.eval
        waited = without_gain(self.evaluations, self.best_by, wanted.min_delta)
        if not wanted.stop_after or waited < wanted.stop_after:
            return ""
        return f"no gain in {self.best_by} for {waited} evaluations"

    def save(self, in_background: bool = False, optional: bool = False) -> Path:
        """Write a checkpoint of the model as it is; see `checkpoint.save`."""
        self.tell("saving a checkpoint", 0, 0)
        return checkpoint.save(
            self.checkpoints,
            self.state,
            self.loss,
            self.optimizer,
            self.config.checkpoint.keep,
            self.writer if in_background and self.config.checkpoint.background else None,
            self.run.records(),
            optional,
            costs(self.evaluations, self.best_by),
            None if self.mirror is None else self.mirror.send,
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
        problem = checkpoint.shortage(self.run.folder, needed) if distributed.is_main() else ""
        return distributed.broadcast(problem)
