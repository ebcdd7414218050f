"""What a trainer does with its model between steps: generate, decode, evaluate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sftx.compat.trlx.data.configs import TRLConfig
from sftx.compat.trlx.trainer import BaseRLTrainer
from sftx.compat.trlx.translate import refuse_several_processes, refuse_untranslatable
from sftx.compat.trlx.utils import significant
from sftx.model.save import load_tokenizer
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


class AccelerateRLTrainer(BaseRLTrainer):
    """A tokenizer, arguments of generation and, once training begins, a model."""

    def __init__(self, config: TRLConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        refuse_several_processes()
        refuse_untranslatable(config)
        path, extra = config.tokenizer.tokenizer_path, config.tokenizer.tokenizer_extra_configs
        trust = bool(extra.get("trust_remote_code", False))
        self.tokenizer = load_tokenizer(Model(path=path, trust_remote_code=trust))
        if self.tokenizer.eos_token is None:
            raise UserError(f"tokenizer.tokenizer_path: {path} has no EOS token")
        self.tokenizer.padding_side = config.tokenizer.padding_side
        self.tokenizer.truncation_side = config.tokenizer.truncation_side
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        gen_kwargs = vars(config.method).get("gen_kwargs", {})
        special = {
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        self.generate_kwargs: dict[str, Any] = {**gen_kwargs, **special}
        self.nth_evaluation = 0
        self._job: Job | None = None

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
    def generate_sweep_kwarg(self) -> tuple[str, list[Any]] | None:
        """The first argument of generation that is given as a list, to be swept over in evaluation."""
        swept = [
            (k, v)
            for k, v in self.generate_kwargs.items()
            if isinstance(v, list) and k not in _LISTS_BY_NATURE
        ]
        return swept[0] if swept else None

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The model's `generate`, in evaluation mode; what it returns begins with the prompts. [B,
        prompt + new].
        """
        loss, device = self.job.loss, self.job.machine.device
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        one = {
            key: value[0] if isinstance(value, list) and key not in _LISTS_BY_NATURE else value
            for key, value in self.generate_kwargs.items()
        }
        training = loss.training
        self._serve(self.job)
        try:
            with torch.no_grad():
                arguments = {**one, **kwargs}
                return self.model.generate(
                    input_ids=input_ids.to(device), attention_mask=mask.to(device), **arguments
                )
        finally:
            if training:
                loss.use_segments(True)
                loss.train()

    generate_eval = generate

    @staticmethod
    def _serve(job: Job) -> None:
        """Put the model into the state in which any other code can use it."""
        job.loss.use_segments(False)
        job.loss.model.config.use_cache = True
        job.loss.eval()

    def decode(
        self, prompts: Any, samples: Any, prompt_sizes: Any = None, append_eos_token: bool = False
    ) -> tuple[list[str], list[str], list[str]]:
        """Token ids as texts: (samples, prompts, outputs), outputs cut, right-stripped, at the stop
        sequences.
        """
        sizes = (
            [len(prompt) for prompt in prompts]
            if prompt_sizes is None
            else [int(size) for size in prompt_sizes]
        )
        texts, asked, outputs = [], [], []
        for prompt, sample, size in zip(prompts, samples, sizes, strict=True):
            output = self.tokenizer.decode(sample[size:], skip_special_tokens=True)
            stops = [place for stop in self.stop_sequences if (place := output.find(stop)) >= 0]
            if stops:
                output = output[: min(stops)].rstrip()
            ended = int(sample[-1]) in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
            if append_eos_token and (stops or ended):
                output += self.tokenizer.eos_token
            asked.append(self.tokenizer.decode(prompt[:size], skip_special_tokens=True))
            outputs.append(output)
            texts.append(asked[-1] + output)
        return texts, asked, outputs

    def evaluate(self) -> dict[str, Any]:
        """Continue the evaluation prompts, show the first of them, and return the means of the
        metrics.

        They are named `metrics/NAME` or, where an argument of generation is swept,
        `metrics/NAME@ARGUMENT=VALUE`.
        """
        if self.eval_pipeline is None:
            return {}
        argument, values = self.generate_sweep_kwarg or ("", [None])
        stats: dict[str, Any] = {}
        shown: dict[str, list[Any]] = {}
        began = perf_counter()
        for value in values:
            texts, extra = self._continued({argument: value} if argument else {})
            measured = (
                {} if self.metric_fn is None else self._measured(self.metric_fn, {**texts, **extra})
            )
            if not isinstance(measured, dict):
                raise UserError(
                    "metric_fn: a dictionary of lists, by name, is needed; found "
                    f"{type(measured).__name__}"
                )
            suffix = f"@{argument}={value}" if argument else ""
            stats |= {
                f"metrics/{name}{suffix}": _mean(name, numbers)
                for name, numbers in measured.items()
            }
            count = len(texts["prompts"])
            part = {argument: [value] * count} if argument else {}
            part |= {"prompt": texts["prompts"], "output": texts["outputs"]}
            part |= {
                k: list(v) for k, v in measured.items() if hasattr(v, "__len__") and len(v) == count
            }
            shown = {name: shown.get(name, []) + column for name, column in part.items()}
        stats["time/generate"] = perf_counter() - began
        self._show(stats, shown)
        self.nth_evaluation += 1
        return stats

    def _measured(self, metric_fn: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """What the metric function returns; it is given the tokenizer where it names such a
        parameter.
        """
        if "tokenizer" in inspect.signature(metric_fn).parameters:
            arguments = {**arguments, "tokenizer": self.tokenizer}
        return metric_fn(**arguments)

    def _continued(
        self, sweep: dict[str, Any]
    ) -> tuple[dict[str, list[str]], dict[str, list[Any]]]:
        """The arguments of the metric function: `samples`, `prompts`, `outputs`, and the prompts'
        extra keys.
        """
        texts: dict[str, list[str]] = {"samples": [], "prompts": [], "outputs": []}
        extra: dict[str, list[Any]] = {}
        for batch in self.eval_pipeline.create_loader(self.config.train.batch_size):
            ids = batch["input_ids"]
            generated = self.generate_eval(ids, batch["attention_mask"], **sweep)
            for column, new in zip(texts.values(), self.decode(ids, generated), strict=True):
                column += new
            for key in set(batch) - {"input_ids", "attention_mask"}:
                extra[key] = extra.get(key, []) + list(batch[key])
        return texts, extra

    def _show(self, stats: dict[str, Any], columns: dict[str, list[Any]]) -> None:
        means = [
            f"{name}: {significant(value)}"
            for name, value in stats.items()
            if name.startswith("metrics/")
        ]
        table = Table(
            *columns,
            title=" ".join([f"Evaluation #{self.nth_evaluation}", *means]),
            show_lines=True,
        )
        for row in list(zip(*columns.values(), strict=True))[:3]:
            table.add_row(*[str(significant(value)) for value in row])
        Console().print(table)


def _mean(name: str, numbers: Any) -> float:
    try:
        return torch.as_tensor(numbers, dtype=torch.float64).mean().item()
    except (TypeError, ValueError) as error:
        raise UserError(f"metric_fn: {name} must be a number per sample: {error}") from error
