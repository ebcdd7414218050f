"""The trainer of supervised fine-tuning: trlx's methods over sftx's steps."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from sftx.compat.trlx import translate
from sftx.compat.trlx.data.configs import TRLConfig
from sftx.compat.trlx.data.method_configs import MethodConfig, register_method
from sftx.compat.trlx.pipeline.offline_pipeline import (
    IGNORED,
    DialogStore,
    PromptPipeline,
    tokenize_dialogue,
)
from sftx.compat.trlx.trainer import register_trainer
from sftx.compat.trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer
from sftx.compat.trlx.trainer.record import TrlxRun, refuse_foreign_folder, tracked
from sftx.compat.trlx.utils.logging import is_progress_bar_enabled
from sftx.model.runtime import machine
from sftx.model.save import save_model
from sftx.report.lock import owned
from sftx.report.progress import Progress
from sftx.training import checkpoint
from sftx.training.best import best_step
from sftx.training.build import prepare
from sftx.training.control import Control
from sftx.training.job import Job
from sftx.training.loop import take_steps
from sftx.training.optim import peak_learning_rate
from sftx.training.signals import StopFlag, Stopped, listening
from sftx.types import StepRecord, UserError

_OWN_LOOP = (
    "loss",
    "get_arch",
    "setup_model",
    "setup_optimizer",
    "setup_scheduler",
    "prepare_learning",
    "create_train_dataloader",
    "generate_eval",
)
"""What trlx's own loop would call on a trainer, and sftx's does not."""
_OF_A_MODEL = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
_DONE_ANYWAY: dict[str, tuple[object, ...]] = {
    "safe_serialization": (True,),
    "is_main_process": (True,),
    "push_to_hub": (False,),
    "save_function": (torch.save,),
    "state_dict": (None,),
}
"""Options of saving, with the values that ask for what is done anyway."""


@register_method
@dataclass
class SFTConfig(MethodConfig):
    """Supervised fine-tuning: arguments of generation, one of which may be a list to sweep over."""

    gen_kwargs: dict[str, Any]


@register_trainer
class AccelerateSFTTrainer(AccelerateRLTrainer):
    """Trains on `store` with sftx, evaluates by generation, and saves in trlx's layout."""

    def __init__(self, config: TRLConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        for name in _OWN_LOOP:
            own = getattr(type(self), name, None)
            if own is not getattr(AccelerateRLTrainer, name, None):
                raise UserError(
                    f"{type(self).__name__}.{name}: sftx itself computes the loss and generates; "
                    "nothing would call this"
                )
        self._folder = Path(config.train.checkpoint_dir)
        self._resume_from: Path | None = None

    def make_experience(self, samples: Sequence[Any], seq_length: int) -> None:
        """Tokenise: texts as they are, or lists as dialogues.

        Among dialogues, a text is short for (BOS, text). Raises UserError for a sample that is
        neither, or a list after a first text.
        """
        refuse_foreign_folder(self._folder / translate.RUN_FOLDER)
        samples = list(samples)
        if isinstance(samples[0], str):
            for i, sample in enumerate(samples):
                if not isinstance(sample, str):
                    raise UserError(
                        f"samples[{i}]: found {type(sample).__name__} where the first sample is a "
                        "text, so that its prompt would be trained on too; give all samples as "
                        "lists, a text as [bos_token, text]"
                    )
            self.store = PromptPipeline(samples, seq_length, self.tokenizer)
            return
        dialogs = []
        for i, sample in enumerate(samples):
            try:
                dialogs.append(tokenize_dialogue(sample, self.tokenizer, seq_length))
            except UserError as error:
                raise UserError(f"samples[{i}]: {error}") from None
        self.store = DialogStore(dialogs, self.tokenizer)

    def post_backward_callback(self) -> None:
        """Called after every step; for subclasses."""

    def post_epoch_callback(self) -> None:
        """Called after every pass over the data; for subclasses."""

    def learn(self) -> dict[str, float]:
        """Train to the end; returns the statistics of the last evaluation.

        What was trained is saved before it is evaluated, and whatever error ends the run.
        """
        results: dict[str, float] = {}
        with ExitStack() as stack:
            stop = stack.enter_context(listening())
            progress = stack.enter_context(Progress(True))
            job = self._prepare(progress, stack)
            stack.enter_context(tracked(self.config, job.run, progress.say))
            stack.push(self._rescue)
            if self.iter_count == 0:
                results = self._evaluated()
                job.run.update(eval_before=results)
            job.take_back()
            for record in take_steps(job, Control(exact=True)):
                if is_progress_bar_enabled():
                    progress.step(record)
                job.run.write(record)
                results = self._after_step(record) or results
                if stop():
                    self._stop(f"stopped by signal {stop.signal} after step {record.step}")
                job.take_back()
            job.run.update(status="finished")
            job.hand_over()
        return results

    def _prepare(self, progress: Progress, stack: ExitStack) -> Job:
        """Load everything; continue from what `load` named."""
        folder = self._folder / translate.RUN_FOLDER
        refuse_foreign_folder(folder)
        stack.enter_context(owned(folder))
        config = translate.to_config(self.config, _rows(self.store))
        begin = 0 if self._resume_from is None else _step_saved_in(self._resume_from)
        run = TrlxRun(config, begin, json.loads(str(self.config)))
        here = stack.enter_context(machine(config.runtime))
        peak = peak_learning_rate(config.optim, config.adapter)
        rate = translate.learning_rate(self.config.scheduler, peak)
        # Signals are answered by `learn`: the loop sees none.
        job = self._job = prepare(config, here, run, progress, stack, StopFlag(), rate)
        job.optimizer = translate.optimizer(self.config.optimizer, job.optimizer)
        job.optimizer.register_step_pre_hook(self._begin_update)
        job.optimizer.register_step_post_hook(self._end_update)
        self.iter_count = 0
        self._saved = 0  # the step of the last checkpoint
        self._epoch = 0  # passes over the data that have ended
        self._is_updating = False
        if self._resume_from is not None:
            self._restore(job, self._resume_from)
        return job

    def _begin_update(self, *_: object) -> None:
        self._is_updating = True

    def _end_update(self, *_: object) -> None:
        self._is_updating = False
        self.iter_count += 1

    def _after_step(self, record: StepRecord) -> dict[str, float]:
        """Call back; save and evaluate where that is due. Returns the evaluation's statistics."""
        self.post_backward_callback()
        if int(record.epoch) > self._epoch:
            self._epoch = int(record.epoch)
            self.post_epoch_callback()
        train = self.config.train
        last = record.step == record.num_steps
        if last or record.step % train.checkpoint_interval == 0:
            self._checkpoint()
        if not last and record.step % train.eval_interval != 0:
            return {}
        record.eval = results = self._evaluated()
        self.job.run.write_evaluation(record.step, record.num_steps, results)
        reward = "reward/mean" if "reward/mean" in results else "metrics/reward"
        if train.save_best and best_step(self.job.evaluations, reward) == record.step:
            self._write(self._folder / "best_checkpoint")
        return results

    def _evaluated(self) -> dict[str, float]:
        """Evaluate, and keep the numbers and the answers with the run."""
        job = self.job
        step = self.iter_count
        results = self.evaluate()
        job.run.write_samples(job.samples, again=step in job.evaluations)
        job.evaluations[step] = results
        return results

    def _stop(self, why: str) -> None:
        self._checkpoint()
        self.job.run.update(status="stopped", stopped_at=self.iter_count)
        raise Stopped(f"{why}, which is saved")

    def _rescue(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Where an error ends the run: save the steps that no checkpoint holds yet."""
        if kind is None or self.iter_count == self._saved:
            return
        if self._is_updating:
            # Some weights have taken the step and others have not: no state to continue from.
            folder = self._folder / "interrupted"
            self.save_pretrained(str(folder / "hf_model"))
            step = self.iter_count + 1
            said = f"in the midst of step {step}: the model as it is then is in {folder}"
        else:
            said = f"after step {self.iter_count}: the model is saved in {self._checkpoint()}"
        print(f"note: {kind.__name__} {said}", file=sys.stderr)

    def save_pretrained(self, directory: str | None = None, **options: Any) -> None:
        """Write model and tokenizer as a Hugging Face folder.

        Default: `hf_model` in the checkpoint folder. Of transformers' options `max_shard_size`
        applies. Any other that would change what is written raises UserError, once the folder is
        there.
        """
        job = self.job
        folder = Path(directory) if directory else self._folder / "hf_model"
        if job.adapted is None and (folder / "adapter_config.json").exists():
            raise UserError(
                f"{folder} holds an adapter, which would be loaded over the model written there; "
                "name another folder, or delete adapter_config.json"
            )
        folder.mkdir(parents=True, exist_ok=True)
        job.hand_over()  # the saved configuration must not name our attention
        source = self.config.model.model_path
        save_model(
            folder,
            self.model,
            self.tokenizer,
            [self.tokenizer.eos_token_id],
            f"Fine-tuned from {source} with sftx, {self.iter_count} steps.\n",
            torch.float32,
            max_shard_size=options.pop("max_shard_size", "50GB"),
        )
        _refuse_options(f"save_pretrained: {folder} is written, but ", options)

    def save(self, directory: str | None = None, **options: object) -> None:
        """Write weights, optimizer and step, to continue from; default: the checkpoint folder."""
        job = self.job
        step = self.iter_count
        folder = Path(directory) if directory else self._folder
        for later in checkpoint.folders(folder):
            # An earlier run went further here: its state is not this one's.
            if checkpoint.step_of(later) >= step:
                shutil.rmtree(later)
        state = replace(job.state, step=step)
        checkpoint.save(folder, state, job.loss, job.optimizer, keep=1)
        _refuse_options(f"save: {folder} is written, but ", options)

    def load(self, directory: str | None = None, **options: object) -> None:
        """Continue from what `save` wrote; before training, this is done when it begins."""
        _refuse_options("load: ", options)
        self._resume_from = Path(directory) if directory else self._folder
        if self._job is not None:
            self._restore(self._job, self._resume_from)

    def _restore(self, job: Job, folder: Path) -> None:
        _step_saved_in(folder)
        state = checkpoint.restore(folder, job.loss, job.optimizer)
        assert state is not None, "a checkpoint was found there"
        self.iter_count = self._saved = state.step
        job.state = replace(
            job.state,
            step=state.step,
            total_tokens=state.total_tokens,
            total_targets=state.total_targets,
        )
        self._epoch = int(job.plan.epoch(state.step - 1))

    def _checkpoint(self) -> Path:
        """Save this step under its name, once."""
        digits = len(str(self.job.plan.num_steps))
        folder = self._folder / f"checkpoint_{self.iter_count:0{digits}d}"
        if self.iter_count != self._saved:
            self._write(folder)
            self._saved = self.iter_count
        return folder

    def _write(self, folder: Path) -> None:
        if self.config.train.save_optimizer:
            self.save(str(folder))
        model = folder / "hf_model"
        for name in _OF_A_MODEL:
            # Those of an earlier run, which may have trained an adapter, or none.
            for path in model.glob(name):
                path.unlink()
        self.save_pretrained(str(model))


def _step_saved_in(folder: Path) -> int:
    state = checkpoint.newest(folder)
    if state is None:
        raise UserError(f"{folder} holds no checkpoint written by `save` (train.save_optimizer)")
    return state.step


def _refuse_options(what: str, options: Mapping[str, object]) -> None:
    """Raise UserError for options that ask for anything else than what is done anyway."""
    for name, value in options.items():
        if value not in _DONE_ANYWAY.get(name, ()):
            raise UserError(f"{what}{name}={value!r} is not understood; leave it out")


def _rows(store: Any) -> list[dict[str, list[int]]]:
    """A store's elements as rows of tokens; a note counts those without a target, left out here."""
    loader = getattr(type(store), "create_loader", None)
    if loader is not None and loader.__module__ != PromptPipeline.__module__:
        name = f"{type(store).__name__}.create_loader"
        print(
            f"note: {name} is not called: sftx shuffles and packs the store's elements itself",
            file=sys.stderr,
        )
    rows: list[dict[str, list[int]]] = []
    for i in range(len(store)):
        element = store[i]
        ids = [int(token) for token in element["input_ids"]]
        targets = [int(label) for label in element.get("labels", ids)[1:]]
        if any(label != IGNORED for label in targets):
            rows.append({"input_ids": ids, "labels": [IGNORED, *targets]})
    empty = len(store) - len(rows)
    if empty:
        print(
            f"note: {empty} of {len(store)} samples have no target left and are not trained on",
            file=sys.stderr,
        )
    if not rows:
        raise UserError("samples: no sample has a target left; is train.seq_length too small?")
    return rows
