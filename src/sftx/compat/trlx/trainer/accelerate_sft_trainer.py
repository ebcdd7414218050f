"""The trainer of supervised fine-tuning: trlx's methods over sftx's steps."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
from sftx.compat.trlx.trainer.trackers import tracker
from sftx.compat.trlx.utils.logging import is_progress_bar_enabled
from sftx.data.pack import build_pack
from sftx.data.tokenizer import read_json
from sftx.files import write_text
from sftx.model.pack_loss import to_tensors
from sftx.model.runtime import machine
from sftx.model.save import save_model
from sftx.report.lock import owned
from sftx.report.progress import Progress
from sftx.report.record import Run
from sftx.settings.schema import Config
from sftx.training import checkpoint
from sftx.training.export import TRLX
from sftx.training.metrics import StepMetrics
from sftx.training.optim import build_optimizer
from sftx.training.prepare import Job, prepare
from sftx.training.signals import Stopped, listening
from sftx.training.step import train_step
from sftx.types import StepRecord, UserError

_OWN_LOOP = (
    "loss",
    "get_arch",
    "setup_model",
    "setup_optimizer",
    "setup_scheduler",
    "prepare_learning",
    "create_train_dataloader",
)
"""What trlx's own loop would call on a trainer, and sftx's does not."""
_OF_A_MODEL = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
_AS_IT_IS = {
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
    """Supervised fine-tuning: arguments of generation, one of which may be a list for evaluation to
    sweep over.
    """

    gen_kwargs: dict[str, Any]


@register_trainer
class AccelerateSFTTrainer(AccelerateRLTrainer):
    """Trains on `store` with sftx, evaluates by generation, and saves in trlx's layout."""

    def __init__(self, config: TRLConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        for name in _OWN_LOOP:
            if hasattr(type(self), name):
                raise UserError(
                    f"{type(self).__name__}.{name}: sftx's step computes the loss; nothing would "
                    "call this"
                )
        self.iter_count = 0
        self._resume_from: str | None = None
        self._saved = 0  # the step of the last checkpoint
        self._epoch = 0  # passes over the data that have ended
        self._updating = False

    def make_experience(self, samples: Sequence[Any], seq_length: int) -> None:
        """Tokenise: texts as they are, or lists as dialogues (among which a text is short for (BOS,
        text)).

        Raises UserError for a sample that is neither, or a list after a first text.
        """
        _refuse_foreign_folder(self._record_folder)
        samples = list(samples)
        if isinstance(samples[0], str):
            for i, sample in enumerate(samples):
                if not isinstance(sample, str):
                    raise UserError(
                        f"samples[{i}]: found {type(sample).__name__} where the first sample is a "
                        "text, so that its "
                        "prompt would be trained on too; give all samples as lists, a text as "
                        "[bos_token, text]"
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

    def learn(self) -> dict[str, Any]:
        """Train to the end; returns the statistics of the last evaluation.

        What was trained is saved before it is evaluated, and whatever error ends the run.
        """
        results: dict[str, Any] = {}
        with ExitStack() as stack:
            stop = stack.enter_context(listening())
            tracking = tracker(self.config)
            progress = stack.enter_context(Progress(True))
            job = self._prepare(progress, stack)
            log = stack.enter_context(tracking)
            stack.push(self._rescue)
            if self.iter_count == 0:
                results = self.evaluate()
                job.run.update(eval_before=results)
                log(results, 0)
            best = float("-inf")
            for record in self._steps(job):
                if is_progress_bar_enabled():
                    progress.step(record)
                job.run.write(record)
                self._call_back(record)
                if self._due(record, self.config.train.checkpoint_interval):
                    self._checkpoint()
                if self._due(record, self.config.train.eval_interval):
                    record.eval = results = self.evaluate()
                    job.run.write_evaluation(record.step, record.num_steps, results)
                numbers = {"loss": record.loss, "learning_rate_group_0": record.learning_rate}
                log(numbers | (record.eval or {}), self.iter_count)
                best = self._keep_best(record, best)
                if stop():
                    self._checkpoint()
                    job.run.update(status="stopped", stopped_at=self.iter_count)
                    raise Stopped(
                        f"stopped by signal {stop.signal} after step {self.iter_count}, which is "
                        "saved"
                    )
            job.run.update(status="finished")
            self._serve(job)
        return results

    def _call_back(self, record: StepRecord) -> None:
        """The callbacks of subclasses: after every step, and when a pass over the data ends with
        it.
        """
        self.post_backward_callback()
        if int(record.epoch) > self._epoch:
            self._epoch = int(record.epoch)
            self.post_epoch_callback()

    @staticmethod
    def _due(record: StepRecord, interval: int) -> bool:
        return record.step == record.num_steps or record.step % interval == 0

    def _keep_best(self, record: StepRecord, best: float) -> float:
        """Save `best_checkpoint` where this evaluation has the highest reward so far, and return
        that reward.
        """
        if not self.config.train.save_best or record.eval is None:
            return best
        reward = record.eval.get("reward/mean", record.eval.get("metrics/reward", float("-inf")))
        if reward > best:
            self._write(Path(self.config.train.checkpoint_dir) / "best_checkpoint")
        return max(reward, best)

    @property
    def _record_folder(self) -> Path:
        return Path(self.config.train.checkpoint_dir) / translate.RUN_FOLDER

    def _prepare(self, progress: Progress, stack: ExitStack) -> Job:
        """Load everything; continue from what `load` named."""
        _refuse_foreign_folder(self._record_folder)
        stack.enter_context(owned(self._record_folder))
        config = translate.to_config(self.config, _rows(self.store))
        begin, earlier = 0, Run(config).facts
        if self._resume_from is not None:
            begin = _step_saved_in(Path(self._resume_from))
        run = _Record(config, begin)
        here = stack.enter_context(machine(config.runtime))
        job = self._job = prepare(config, here, run, progress, stack)
        job.optimizer = translate.optimizer(
            self.config.optimizer, build_optimizer(job.loss, config.optim)
        )
        self._watch_updates(job.optimizer)
        run.update(**{TRLX: json.loads(str(self.config))})
        if self._resume_from is not None:
            self._restore(job, self._resume_from)
            if "eval_before" in earlier:
                run.update(eval_before=earlier["eval_before"])
        return job

    def _watch_updates(self, optimizer: torch.optim.Optimizer) -> None:
        def begins(*_: Any) -> None:
            self._updating = True

        def ends(*_: Any) -> None:
            self._updating = False

        optimizer.register_step_pre_hook(begins)
        optimizer.register_step_post_hook(ends)

    def _steps(self, job: Job) -> Iterator[StepRecord]:
        """sftx's steps, at trlx's learning rates; the model is as the record says when it is
        yielded.
        """
        rate = translate.learning_rate(self.config.scheduler, job.peak)
        meter, size = StepMetrics(job), job.machine.tokens_per_pack
        for step in range(job.start, job.plan.num_steps):
            job.peak = rate(
                step
            )  # the schedule of the translated settings is constant, so this is the rate
            torch.manual_seed(
                job.config.seed * 1_000_003 + step
            )  # dropout has a stream of its own in every step
            packs = [
                build_pack([job.corpus.example(i) for i in pack], pack)
                for pack in job.plan.packs(step, size)[0]
            ]
            tensors = [to_tensors(pack, job.machine.device) for pack in packs]
            total, autocast = job.plan.total_weight(step), job.machine.autocast
            result = train_step(job.loss, job.optimizer, tensors, total, job.peak, 0.0, autocast)
            self.iter_count = step + 1
            yield meter.read(step, result, None)
            meter.restart()

    def _rescue(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Where an error ends the run: save the steps that no checkpoint holds yet."""
        if kind is None or self.iter_count == self._saved:
            return
        if (
            self._updating
        ):  # some weights have taken the step and others have not: no state to continue from
            folder = Path(self.config.train.checkpoint_dir) / "interrupted"
            self.save_pretrained(str(folder / "hf_model"))
            said = (
                f"in the midst of step {self.iter_count + 1}: the model as it is then is in "
                f"{folder}"
            )
        else:
            said = f"after step {self.iter_count}: the model is saved in {self._checkpoint()}"
        print(f"note: {kind.__name__} {said}", file=sys.stderr)

    def save_pretrained(self, directory: str | None = None, **options: Any) -> None:
        """Write model and tokenizer as a Hugging Face folder; default: `hf_model` in the checkpoint
        folder.

        Of transformers' options `max_shard_size` applies. Any other that would change what is
        written raises UserError, once the folder is there.
        """
        job = self.job
        folder = Path(directory or Path(self.config.train.checkpoint_dir) / "hf_model")
        if job.adapted is None and (folder / "adapter_config.json").exists():
            raise UserError(
                f"{folder} holds an adapter, which would be loaded over the model written there; "
                "name another folder, "
                "or delete adapter_config.json"
            )
        folder.mkdir(parents=True, exist_ok=True)
        training = job.loss.training
        self._serve(job)  # the saved configuration must not name our attention
        card = (
            f"Fine-tuned from {self.config.model.model_path} with sftx, {self.iter_count} steps.\n"
        )
        sizes = (
            {"max_shard_size": options.pop("max_shard_size")} if "max_shard_size" in options else {}
        )
        save_model(
            folder,
            self.model,
            self.tokenizer,
            [self.tokenizer.eos_token_id],
            card,
            torch.float32,
            **sizes,
        )
        if training:
            job.loss.use_segments(True)
            job.loss.train()
        _refuse_options("save_pretrained", folder, options)

    def save(self, directory: str | None = None, **options: Any) -> None:
        """Write weights, optimizer and step, to continue from; default: the checkpoint folder."""
        job, step = self.job, self.iter_count
        folder = Path(directory or self.config.train.checkpoint_dir)
        for later in checkpoint.folders(
            folder
        ):  # an earlier run went further here: its state is not this one's
            if checkpoint.step_of(later) >= step:
                shutil.rmtree(later)
        state = checkpoint.State(
            step, job.plan.fingerprint, job.mathematics, job.total_tokens, job.total_targets
        )
        checkpoint.save(folder, state, job.loss, job.optimizer, keep=1)
        _refuse_options("save", folder, options)

    def load(self, directory: str | None = None, **options: Any) -> None:
        """Continue from what `save` wrote: weights, optimizer and step; before training, when it
        begins.
        """
        _refuse_options("load", None, options)
        self._resume_from = str(directory or self.config.train.checkpoint_dir)
        if self._job is not None:
            self._restore(self._job, self._resume_from)

    def _restore(self, job: Job, directory: str) -> None:
        _step_saved_in(Path(directory))
        state = checkpoint.restore(Path(directory), job.loss, job.optimizer)
        assert state is not None, "a checkpoint was found there"
        job.start = self.iter_count = self._saved = state.step
        job.total_tokens, job.total_targets = state.total_tokens, state.total_targets
        self._epoch = int(job.plan.epoch(state.step - 1))

    def _folder_of(self, step: int) -> Path:
        digits = len(str(self.job.plan.num_steps))
        return Path(self.config.train.checkpoint_dir) / f"checkpoint_{step:0{digits}d}"

    def _checkpoint(self) -> Path:
        """Save this step under its name, once."""
        folder = self._folder_of(self.iter_count)
        if self.iter_count != self._saved:
            self._write(folder)
            self._saved = self.iter_count
        return folder

    def _write(self, folder: Path) -> None:
        if self.config.train.save_optimizer:
            self.save(str(folder))
        model = folder / "hf_model"
        for (
            name
        ) in _OF_A_MODEL:  # those of an earlier run, which may have trained an adapter, or none
            for path in model.glob(name):
                path.unlink()
        self.save_pretrained(str(model))


class _Record(Run):
    """The record of a run that begins anew or continues from a checkpoint, whatever stands in its
    folder.

    Only the files of a record are written anew, and their lines stay up to the step that it begins
    at.
    """

    def __init__(self, config: Config, begin: int) -> None:
        super().__init__(config)
        self.facts = {}  # an earlier run's: they neither forbid this one nor finish it
        self.begin = begin

    def start(self, *given: Any, **facts: Any) -> None:
        """Begin the record, as `Run.start` does, at the step this run begins at."""
        self.writes = False
        super().start(*given, **facts)
        self.writes = True
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "bad_steps.jsonl"):
            path = self.folder / name
            lines = (
                path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            )
            kept = [line for line in lines if self._is_early(line)]
            if kept or path.exists() or name == "metrics.jsonl":
                write_text(path, "".join(kept))
        self.update()

    def _is_early(self, line: str) -> bool:
        return line.endswith("\n") and json.loads(line)["step"] <= self.begin


def _refuse_foreign_folder(folder: Path) -> None:
    """The record of the run goes into a folder that is empty, or that holds the record of such a
    run.
    """
    if not folder.exists() or (
        folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())
    ):
        return
    path = folder / "run.json"
    if path.is_file() and TRLX in read_json(path):
        return
    raise UserError(
        f"train.checkpoint_dir: the record of the run would go to {folder}, which holds something "
        "else; choose another "
        "checkpoint_dir"
    )


def _step_saved_in(directory: Path) -> int:
    state = checkpoint.newest(directory)
    if state is None:
        raise UserError(f"{directory} holds no checkpoint written by `save` (train.save_optimizer)")
    return state.step


def _refuse_options(method: str, folder: Path | None, options: dict[str, Any]) -> None:
    """Raise UserError for options that would change what was done; those that say what is done
    anyway are fine.
    """
    for name, value in options.items():
        if name in _AS_IT_IS and value in _AS_IT_IS[name]:
            continue
        written = f"{folder} is written, but " if folder is not None else ""
        raise UserError(f"{method}: {written}{name}={value!r} is not understood; leave it out")


def _rows(store: Any) -> list[dict[str, list[int]]]:
    """A store's elements as rows of tokens; those in which nothing is a target are left out, with a
    note.
    """
    loader = getattr(type(store), "create_loader", None)
    if loader is not None and loader.__module__ != PromptPipeline.__module__:
        name = f"{type(store).__name__}.create_loader"
        print(
            f"note: {name} is not called: sftx shuffles and packs the store's elements itself",
            file=sys.stderr,
        )
    rows = []
    for i in range(len(store)):
        element = store[i]
        ids = [int(token) for token in element["input_ids"]]
        labels = [int(label) for label in element["labels"]] if "labels" in element else list(ids)
        if any(label != IGNORED for label in labels[1:]):
            rows.append({"input_ids": ids, "labels": [IGNORED, *labels[1:]]})
    if empty := len(store) - len(rows):
        print(
            f"note: {empty} of {len(store)} samples have no target left and are not trained on",
            file=sys.stderr,
        )
    if not rows:
        raise UserError("samples: no sample has a target left; is train.seq_length too small?")
    return rows
