"""What a model scores beside its held-out loss: answers to prompts and their metrics, the stop test,
the loss on a general text, and the distance from its base.

Training asks at its evaluations, and `sftx eval` asks any model: the same questions, the same code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule

from sftx import distributed
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.eval.forgetting import (
    Continuation,
    Gauge,
    gauged,
    log_probabilities,
    read_gauge,
    write_gauge,
)
from sftx.eval.generate import Arguments, Prompt, Sample, answer
from sftx.eval.loss import held_out_loss
from sftx.eval.metrics import OwnMetric, score
from sftx.eval.sampling import AS_SAVED, Sampling
from sftx.model.adapter import bare
from sftx.model.checks.start import evaluating
from sftx.model.pack_loss import PackLoss
from sftx.model.runtime import Machine
from sftx.types import UserError


def never() -> bool:
    """No signal asks to stop."""
    return False


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked of a model, the same at every evaluation.

    `scored`: the names of the numbers that the metrics give. `notes`: what is not asked, and why.
    `generation`: arguments of `generate` that come before those of the model's generation_config.
    """

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    prompts: list[Prompt]
    metrics: list[str | OwnMetric]
    new_tokens: int
    seed: int
    general: Corpus | None = None
    scored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sampling: Sampling = AS_SAVED
    generation: Arguments = field(default_factory=dict)


@dataclass(slots=True)
class Judgement:
    """What one model scores. `numbers` holds the mean of each metric, `ended` (the share of answers
    that end by a stop token), `kl` and `general loss`; `samples` the answers themselves.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)  # of each sample

    def records(self, step: int) -> list[dict[str, object]]:
        """The lines of samples.jsonl."""
        lines: list[dict[str, object]] = []
        for number, sample in enumerate(self.samples):
            scores = {name: values[number] for name, values in self.scores.items()}
            lines.append({**sample.as_record(step), "scores": scores})
        return lines


@dataclass
class Judge:
    """Asks the questions of one model, `loss`, which may be in training, and which stays as it was.

    Its base is the model without the adapter `adapted`, or what the model was when `remember` was
    called.
    """

    questions: Questions
    loss: PackLoss
    adapted: PeftModel | None
    machine: Machine
    tokens_per_pack: int
    gauge: Gauge | None = None
    _known: list[Sample] = field(default_factory=list)  # answers of the model as it is

    def ask(self, stop: Callable[[], bool] = never, is_training: bool = False) -> Judgement | None:
        """All that is asked; None where `stop` cut it short.

        UserError for a metric that cannot be computed; with `is_training`, a warning instead.
        """
        samples = self._known or self.answers(stop)
        self._known = []
        if not samples:
            return None
        scores = distributed.broadcast(self._scores(samples, is_training))
        numbers = {name: fmean(values) for name, values in scores.items()}
        numbers["ended"] = fmean(sample.ended for sample in samples)
        if self.gauge is not None and self.gauge.answers:
            with self._by_parts():
                numbers["kl"] = distributed.broadcast(self.gauge.kl(self._log_probabilities))
        general = self.questions.general
        if general is not None:
            found = held_out_loss(
                self.loss, general, self.tokens_per_pack, self.machine.autocast, stop=stop
            )
            if not found:
                return None
            numbers["general loss"] = found["loss"]
        return Judgement(numbers, samples, scores)

    def answers(self, stop: Callable[[], bool] = never) -> list[Sample]:
        """The answers of the model as it is; [] where `stop` cut it short."""
        asked = self.questions
        self.loss.use_segments(False)
        try:
            with self._by_parts():
                return answer(
                    self.loss.model,
                    asked.tokenizer,
                    asked.prompts,
                    sorted(asked.stop_ids),
                    asked.new_tokens,
                    asked.seed,
                    stop,
                    asked.sampling,
                    asked.generation,
                    self.machine.free_memory(),
                )
        finally:
            self.loss.use_segments(True)

    def remember(
        self, path: Path | None = None, stop: Callable[[], bool] = never, is_start: bool = False
    ) -> None:
        """Take the model as it is now for the base, or without its adapter where it has one; its
        answers and what it thinks of them are kept in `path`, else in memory. With `is_start` the
        model, adapter and all, still answers as its base does, and need not be asked again.
        """
        with self.without_adapter():
            samples = self.answers(stop)
        if is_start:
            self._known = samples
        said = [sample.ids for sample in samples]
        if len(said) < len(self.questions.prompts):
            return  # it was cut short
        rows = bare(self.loss.model.get_input_embeddings()).weight.shape[0]
        answers = gauged([prompt.ids for prompt in self.questions.prompts], said, rows)
        if self.adapted is not None:
            self.gauge = Gauge(answers, lambda number: self._of_base(answers[number]))
            return
        with self._by_parts():
            base = [self._log_probabilities(continuation) for continuation in answers]
        self.gauge = Gauge(answers, base.__getitem__)
        if path is not None and distributed.is_main():
            write_gauge(path, answers, base)
        if path is not None:
            distributed.barrier()
            self.gauge = read_gauge(path)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model is its base, where it has an adapter."""
        if self.adapted is None:
            yield
            return
        with self.adapted.disable_adapter():
            yield

    def _of_base(self, continuation: Continuation) -> torch.Tensor:
        with self.without_adapter():
            return self._log_probabilities(continuation)

    def _log_probabilities(self, continuation: Continuation) -> torch.Tensor:
        return log_probabilities(self.loss, continuation)

    @contextmanager
    def _by_parts(self) -> Iterator[None]:
        """Inside, the model evaluates and can be called past `loss`, which holds its shards."""
        with evaluating(self.loss), torch.no_grad(), self.machine.autocast():
            if isinstance(self.loss, FSDPModule):
                self.loss.unshard()
            yield

    def _scores(self, samples: Sequence[Sample], is_training: bool) -> dict[str, list[float]]:
        """What the metrics give each sample; computed by the main rank alone."""
        scores: dict[str, list[float]] = {}
        if not distributed.is_main():
            return scores
        outputs = [sample.output for sample in samples]
        references = [sample.reference for sample in samples]
        prompts = [sample.prompt for sample in samples]
        for metric in self.questions.metrics:
            try:
                scores |= score([metric], prompts, outputs, references)
            except UserError as error:
                if not is_training:
                    raise
                print(f"warning: {error}; the number is left out", file=sys.stderr)
        return scores
