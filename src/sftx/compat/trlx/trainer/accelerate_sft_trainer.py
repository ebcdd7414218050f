"""The trainer of supervised fine-tuning: trlx's methods over sftx's steps."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sftx import dist
from sftx.compat.trlx import translate
from sftx.compat.trlx.data.configs import TRLConfig
from sftx.compat.trlx.data.method_configs import MethodConfig, register_method
from sftx.compat.trlx.pipeline.offline_pipeline import IGNORED, DialogStore, PromptPipeline, tokenize_dialogue
from sftx.compat.trlx.trainer import register_trainer
from sftx.compat.trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer
from sftx.compat.trlx.trainer.trackers import tracker
from sftx.data.pack import build_pack
from sftx.model.load import to_tensors
from sftx.model.runtime import machine
from sftx.model.save import save_model
from sftx.track.lock import owned
from sftx.track.progress import Progress
from sftx.track.record import Run
from sftx.training import checkpoint
from sftx.training.meter import Meter
from sftx.training.optim import build_optimizer
from sftx.training.prepare import Job, prepare
from sftx.training.step import train_step
from sftx.training.stop import Stopped, listening
from sftx.types import StepRecord, UserError

_OWN_LOOP = ("loss", "get_arch", "setup_model", "setup_optimizer", "setup_scheduler")


@register_method
@dataclass
class SFTConfig(MethodConfig):
    """Supervised fine-tuning: arguments of generation, one of which may be a list for evaluation to sweep over."""

    gen_kwargs: dict[str, Any]


@register_trainer
class AccelerateSFTTrainer(AccelerateRLTrainer):
    """Trains on `store` with sftx, evaluates by generation, and saves in trlx's layout."""

    def __init__(self, config: TRLConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        for name in _OWN_LOOP:
            if hasattr(type(self), name):
                raise UserError(f"{type(self).__name__}.{name}: sftx's step computes the loss; nothing would call this")
        self.iter_count = 0
        self._resume_from: str | None = None

    def make_experience(self, samples: Sequence[Any], seq_length: int) -> None:
        """Tokenise: strings as plain text, lists as dialogues (among which a string is short for (BOS, string))."""
        if isinstance(samples[0], str):
            self.store = PromptPipeline(samples, seq_length, self.tokenizer)
        else:
            self.store = DialogStore(
                [tokenize_dialogue(d, self.tokenizer, seq_length) for d in samples], self.tokenizer
            )

    def post_backward_callback(self) -> None:
        """Called after every step; for subclasses."""

    def post_epoch_callback(self) -> None:
        """Called after every pass over the data; for subclasses."""

    def learn(self) -> dict[str, Any]:
        """Train to the end; returns the statistics of the last evaluation."""
        train, results, best = self.config.train, {}, float("-inf")
        with ExitStack() as stack:
            stop = stack.enter_context(listening())
            log = stack.enter_context(tracker(self.config))
            job = self._prepare(stack)
            if self.iter_count == 0:
                results = self.evaluate()
                job.run.update(eval_before=results)
                log(results, 0)
            for record in self._steps(job):
                self.iter_count, last = record.step, record.step == record.num_steps
                if last or self.iter_count % train.eval_interval == 0:
                    record.eval = results = self.evaluate()
                job.run.write(record)
                numbers = {"loss": record.loss, "learning_rate_group_0": record.learning_rate}
                log(numbers | (record.eval or {}), self.iter_count)
                if last or self.iter_count % train.checkpoint_interval == 0 or stop():
                    self._checkpoint(f"checkpoint_{self.iter_count:0{len(str(record.num_steps))}d}")
                reward = results.get("reward/mean", results.get("metrics/reward", float("-inf")))
                if train.save_best and record.eval is not None and reward > best:
                    best = reward
                    self._checkpoint("best_checkpoint")
                if stop():
                    job.run.update(status="stopped")
                    raise Stopped(f"stopped by signal {stop.signal} after step {self.iter_count}, which is saved")
            job.run.update(status="finished")
            self._serve(job)
        return results

    def _prepare(self, stack: ExitStack) -> Job:
        """Load everything; continue from what `load` named."""
        if dist.world_size() > 1:
            raise UserError("trlx's trainer runs in one process here; `sftx train` trains in several")
        run = Run(translate.to_config(self.config, _rows(self.store)))
        shutil.rmtree(run.folder, ignore_errors=True)  # the record of an earlier run of the same script
        stack.enter_context(owned(run.folder))
        run = Run(run.config)
        progress = stack.enter_context(Progress(run.config.runtime.progress))
        here = stack.enter_context(machine(run.config.runtime))
        job = self._job = prepare(run.config, here, run, progress, stack)
        job.optimizer = translate.optimizer(self.config.optimizer, build_optimizer(job.loss, run.config.optim))
        run.update(trlx=json.loads(str(self.config)))
        if self._resume_from is not None:
            self._restore(job, self._resume_from)
        return job

    def _steps(self, job: Job) -> Iterator[StepRecord]:
        """sftx's steps, at trlx's learning rates; the model is as the record says when it is yielded."""
        rate = translate.learning_rate(self.config.scheduler, job.peak)
        meter, epoch, size = Meter(job), 0, job.machine.tokens_per_pack
        for step in range(job.start, job.plan.num_steps):
            job.peak = rate(step)  # the schedule of the translated settings is constant, so this is the rate
            torch.manual_seed(job.config.seed * 1_000_003 + step)  # dropout has a stream of its own in every step
            packs = [build_pack([job.corpus.example(i) for i in pack], pack) for pack in job.plan.packs(step, size)[0]]
            tensors = [to_tensors(pack, job.machine.device) for pack in packs]
            total, autocast = job.plan.total_weight(step), job.machine.autocast
            result = train_step(job.loss, job.optimizer, tensors, total, job.peak, 0.0, autocast)
            record = meter.read(step, result, None)
            self.post_backward_callback()
            if int(record.epoch) > epoch:
                epoch = int(record.epoch)
                self.post_epoch_callback()
            yield record
            meter.restart()

    def save_pretrained(self, directory: str | None = None) -> None:
        """Write model and tokenizer as a Hugging Face folder; default: `hf_model` in the checkpoint folder."""
        job = self.job
        folder = Path(directory or Path(self.config.train.checkpoint_dir) / "hf_model")
        folder.mkdir(parents=True, exist_ok=True)
        training = job.loss.training
        self._serve(job)  # the saved configuration must not name our attention
        card = f"Fine-tuned from {self.config.model.model_path} with sftx, {self.iter_count} steps.\n"
        save_model(folder, self.model, self.tokenizer, [self.tokenizer.eos_token_id], card, torch.float32)
        if training:
            job.loss.use_segments(True)
            job.loss.train()

    def save(self, directory: str | None = None) -> None:
        """Write weights, optimizer and step, to continue from; default: the checkpoint folder."""
        job, step = self.job, self.iter_count
        state = checkpoint.State(step, job.plan.fingerprint, job.mathematics, job.total_tokens, job.total_targets)
        checkpoint.save(Path(directory or self.config.train.checkpoint_dir), state, job.loss, job.optimizer, keep=1)

    def load(self, directory: str | None = None) -> None:
        """Continue from what `save` wrote: weights, optimizer and step; before training, when it begins."""
        self._resume_from = str(directory or self.config.train.checkpoint_dir)
        if self._job is not None:
            self._restore(self._job, self._resume_from)

    def _restore(self, job: Job, directory: str) -> None:
        state = checkpoint.restore(Path(directory), job.loss, job.optimizer)
        if state is None:
            raise UserError(f"{directory} holds no checkpoint written by `save` (train.save_optimizer)")
        job.start = self.iter_count = state.step
        job.total_tokens, job.total_targets = state.total_tokens, state.total_targets

    def _checkpoint(self, name: str) -> None:
        folder = Path(self.config.train.checkpoint_dir) / name
        if self.config.train.save_optimizer:
            self.save(str(folder))
        self.save_pretrained(str(folder / "hf_model"))


def _rows(store: Any) -> list[dict[str, list[int]]]:
    """A store's elements as rows of tokens; those in which nothing is a target are left out, with a note."""
    rows = []
    for i in range(len(store)):
        element = store[i]
        ids = [int(token) for token in element["input_ids"]]
        labels = [int(label) for label in element["labels"]] if "labels" in element else list(ids)
        if any(label != IGNORED for label in labels[1:]):
            rows.append({"input_ids": ids, "labels": [IGNORED, *labels[1:]]})
    if empty := len(store) - len(rows):
        print(f"note: {empty} of {len(store)} samples have no target left and are not trained on", file=sys.stderr)
    if not rows:
        raise UserError("samples: no sample has a target left; is train.seq_length too small?")
    return rows
