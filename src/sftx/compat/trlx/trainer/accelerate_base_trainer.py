"""What a trainer does with its model between steps: generate, decode, evaluate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sftx.compat.trlx.data.configs import TRLConfig
from sftx.compat.trlx.names import refuse
from sftx.compat.trlx.pipeline import BasePipeline
from sftx.compat.trlx.translate import refuse_several_processes, refuse_untranslatable, trusted
from sftx.eval.generate import Prompt
from sftx.eval.judge import Judge, Questions
from sftx.model.save import load_tokenizer
from sftx.printable import printable
from sftx.settings.schema import Model
from sftx.training.job import Job
from sftx.types import UserError

_LISTS_BY_NATURE = (
    "eos_token_id",
    "bad_words_ids",
    "force_words_ids",
    "suppress_tokens",
    "stop_strings",
)
"""Arguments of generation whose lists are values, not sweeps."""
_SHOWN = 3
"""Answers of an evaluation that are printed."""


class AccelerateRLTrainer:
    """A tokenizer, arguments of generation and, once training begins, a model."""

    def __init__(
        self,
        config: TRLConfig,
        reward_fn: Callable[..., object] | None = None,
        metric_fn: Callable[..., Mapping[str, object]] | None = None,
        logit_mask: object = None,
        stop_sequences: Iterable[str] | None = None,
        train_mode: bool = False,
    ) -> None:
        if reward_fn is not None:
            refuse("reward_fn")
        if logit_mask is not None:
            refuse("logit_mask")
        refuse_several_processes()
        refuse_untranslatable(config)
        self.config = config
        self.metric_fn = metric_fn
        self.stop_sequences = list(stop_sequences or [])
        self.store: Any = None
        self.eval_pipeline: Any = None
        self.tokenizer = _load_tokenizer(config)
        self.generate_kwargs: dict[str, Any] = {
            **vars(config.method).get("gen_kwargs", {}),
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        self.nth_evaluation = 0
        self.iter_count = 0  # steps that the model has taken
        self._job: Job | None = None

    def push_to_store(self, data: Iterable[object]) -> None:
        """Append training elements."""
        self.store.push(data)

    def add_eval_pipeline(self, eval_pipeline: BasePipeline) -> None:
        """Set the prompts of evaluation."""
        self.eval_pipeline = eval_pipeline

    @property
    def job(self) -> Job:
        """The sftx run, once training has begun."""
        if self._job is None:
            raise UserError(
                "the model is loaded when training begins: call `learn` (or `trlx.train`) first"
            )
        return self._job

    @property
    def model(self) -> Any:
        """The Hugging Face model, or the peft model around it."""
        return self.job.trained

    @property
    def generate_sweep_kwarg(self) -> tuple[str, list[object]] | None:
        """The first argument of generation that is a list: evaluation sweeps over it."""
        for name, value in self.generate_kwargs.items():
            if isinstance(value, list) and name not in _LISTS_BY_NATURE:
                return name, value
        return None

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The model's `generate`, in evaluation mode; what it returns begins with the prompts.

        [batch, prompt + new]. An argument that is swept over takes its first value.
        """
        job = self.job
        device = job.machine.device
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        arguments = dict(self.generate_kwargs)
        if self.generate_sweep_kwarg is not None:
            name, values = self.generate_sweep_kwarg
            arguments[name] = values[0]
        arguments.update(kwargs)
        job.hand_over()
        with torch.no_grad():
            return self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                **arguments,
            )

    generate_eval = generate

    def decode(
        self,
        prompts: Iterable[Any],
        samples: Iterable[Any],
        prompt_sizes: Iterable[int] | None = None,
        append_eos_token: bool = False,
    ) -> tuple[list[str], list[str], list[str]]:
        """Token ids as texts: (samples, prompts, outputs).

        Outputs are cut at the first stop sequence, and then stripped on the right.
        """
        texts: list[str] = []
        asked: list[str] = []
        outputs: list[str] = []
        sizes = [len(prompt) for prompt in prompts] if prompt_sizes is None else prompt_sizes
        for prompt, sample, size in zip(prompts, samples, sizes, strict=True):
            output = self.tokenizer.decode(sample[size:], skip_special_tokens=True)
            places = [output.find(stop) for stop in self.stop_sequences if stop in output]
            if places:
                output = output[: min(places)].rstrip()
            ended = int(sample[-1]) in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
            if append_eos_token and (places or ended):
                output += self.tokenizer.eos_token
            asked.append(self.tokenizer.decode(prompt[:size], skip_special_tokens=True))
            outputs.append(output)
            texts.append(asked[-1] + output)
        return texts, asked, outputs

    def evaluate(self) -> dict[str, float]:
        """Let the model continue the prompts, show the first of them, and return the means of the
        metrics.

        They are named `metrics/NAME` or, where an argument of generation is swept,
        `metrics/NAME@ARGUMENT=VALUE`. `job.samples` holds what was generated.
        """
        if self.eval_pipeline is None:
            return {}
        began = perf_counter()
        self.job.samples = []
        stats: dict[str, float] = {}
        if self.generate_sweep_kwarg is None:
            stats |= self._evaluate_with({}, "")
        else:
            name, values = self.generate_sweep_kwarg
            for value in values:
                stats |= self._evaluate_with({name: value}, f"@{name}={value}")
        stats["time/generate"] = perf_counter() - began
        self.job.hand_over()
        self._show(stats)
        self.nth_evaluation += 1
        return stats

    def _evaluate_with(self, swept: Mapping[str, object], suffix: str) -> dict[str, float]:
        """The means of the metrics with these arguments of generation."""
        asked, columns = self._asked()
        samples = self._judge(asked, swept).answers()
        whole = [prompt.ids + sample.ids for prompt, sample in zip(asked, samples, strict=True)]
        texts = self.decode([prompt.ids for prompt in asked], whole)
        columns |= zip(("samples", "prompts", "outputs"), texts, strict=True)
        means: dict[str, float] = {}
        scores: dict[str, list[float]] = {}
        for name, numbers in self._measured(columns).items():
            values = _as_numbers(name, numbers)
            means[f"metrics/{name}{suffix}"] = values.mean().item()
            if values.shape == (len(asked),):
                scores[name] = values.tolist()
        for number, sample in enumerate(samples):
            line = {**sample.as_record(self.iter_count), **swept}
            line |= {"prompt": texts[1][number], "output": texts[2][number]}
            line["scores"] = {name: values[number] for name, values in scores.items()}
            self.job.samples.append(line)
        return means

    def _asked(self) -> tuple[list[Prompt], dict[str, Sequence[object]]]:
        """The prompts of evaluation, and the extra keys that the metric function gets."""
        asked: list[Prompt] = []
        extra: dict[str, Any] = {}
        for batch in self.eval_pipeline.create_loader(self.config.train.batch_size):
            found = dict(batch)
            rows = zip(found.pop("input_ids"), found.pop("attention_mask"), strict=True)
            asked += [Prompt(ids[mask.bool()].tolist(), "", "") for ids, mask in rows]
            for key, values in found.items():
                extra.setdefault(key, []).extend(values)
        return asked, extra

    def _judge(self, asked: list[Prompt], swept: Mapping[str, object]) -> Judge:
        """What lets the model answer, as every evaluation of sftx does."""
        job = self.job
        generation = {**self.generate_kwargs, **swept}
        stop_id, _ = generation.pop("eos_token_id"), generation.pop("pad_token_id")
        questions = Questions(
            tokenizer=job.encoder.tokenizer,
            stop_ids=frozenset([stop_id]),
            prompts=asked,
            metrics=[],
            new_tokens=generation.pop("max_new_tokens"),
            seed=self.config.train.seed,
            generation=generation,
        )
        return Judge(questions, job.loss, job.adapted, job.machine, job.tokens_per_pack)

    def _measured(self, columns: Mapping[str, Sequence[object]]) -> Mapping[str, object]:
        """What the metric function returns; one with a parameter `tokenizer` is given that too."""
        if self.metric_fn is None:
            return {}
        arguments: dict[str, object] = dict(columns)
        if "tokenizer" in inspect.signature(self.metric_fn).parameters:
            arguments["tokenizer"] = self.tokenizer
        measured = self.metric_fn(**arguments)
        if not isinstance(measured, Mapping):
            raise UserError(
                "metric_fn: a dictionary of lists, by name, is needed; found "
                f"{type(measured).__name__}"
            )
        return measured

    def _show(self, stats: Mapping[str, float]) -> None:
        """The numbers of an evaluation, and the first answers."""
        numbers = [f"{name}: {value:.3g}" for name, value in stats.items()]
        lines = [f"Evaluation #{self.nth_evaluation}  {'  '.join(numbers)}"]
        for line in self.job.samples[:_SHOWN]:
            lines += [f"  prompt  {line['prompt']}", f"  output  {line['output']}"]
        print(printable("\n".join(lines)))


def _load_tokenizer(config: TRLConfig) -> Any:
    """The tokenizer that the configuration names; without a pad token it gets EOS for it."""
    path = config.tokenizer.tokenizer_path
    extra = config.tokenizer.tokenizer_extra_configs
    tokenizer = load_tokenizer(Model(path=path, trust_remote_code=trusted(extra)))
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer.tokenizer_path: {path} has no EOS token")
    tokenizer.padding_side = config.tokenizer.padding_side
    tokenizer.truncation_side = config.tokenizer.truncation_side
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _as_numbers(name: str, given: object) -> Tensor:
    """What a metric function gives under a name: a number, or one for each sample."""
    try:
        return torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"metric_fn: {name} must be a number per sample: {error}") from error
