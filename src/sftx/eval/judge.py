"""What a model scores on a set of rows: held-out loss, answers and their metrics, stop test, distance
from its base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from sftx.boundary import boundary
from sftx.data.pack import probe_pack
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.eval.forgetting import Continuation, Forward, divergence
from sftx.eval.generate import Prompt, Sample, answer, prompt_of
from sftx.eval.loss import held_out_loss
from sftx.eval.metrics import score
from sftx.model.adapter import load_adapter
from sftx.model.checks.start import check_paths, check_sizes
from sftx.model.load import load_model
from sftx.model.pack_loss import PackLoss
from sftx.model.runtime import Machine
from sftx.model_config import read_json
from sftx.settings.schema import Model
from sftx.types import UserError

TOKENS_PER_PACK = 2048


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of each model, the same for all."""

    corpus: Corpus
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    prompts: list[Prompt]
    metrics: list[str]
    new_tokens: int
    seed: int


@dataclass(slots=True)
class Judgement:
    """What one model scores. `numbers` holds loss, perplexity, targets, the mean of each metric, and
    `ended`, the share of answers that end by a stop token; `samples` the answers themselves.
    """

    numbers: dict[str, float]
    samples: list[Sample] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)  # of each sample


@dataclass(frozen=True, slots=True)
class Served:
    """A model on its device, checked; `adapter` is the same with the adapter of its folder."""

    loss: PackLoss
    adapter: PeftModel | None

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, which answers."""
        return self.loss.model

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [1, T, V] of ids int64[1, T]."""
        device = next(self.model.parameters()).device
        return self.model(input_ids=ids.to(device), use_cache=False).logits

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model is its base."""
        assert self.adapter is not None
        with self.adapter.disable_adapter():
            yield


def base_of(folder: str) -> str | None:
    """The base that the adapter in `folder` names; None where `folder` holds no adapter.

    Raises:
        UserError: adapter_config.json names no base.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        return None
    name = read_json(file).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{file}: base_model_name_or_path names no model; name it with base=")
    return name


def load_served(model: Model, adapter: str | None, corpus: Corpus, machine: Machine) -> Served:
    """`model`, with the adapter of the folder `adapter` in it, and the checks of its loss behind it.

    Raises:
        UserError: the files are damaged or do not fit each other, or the data does not fit them.
    """
    loaded = load_model(model, machine.device)
    wrapped = None
    if adapter is not None:
        with boundary(f"the adapter in {adapter} cannot be loaded"):
            wrapped = load_adapter(loaded, adapter)
    loss = PackLoss(loaded).eval()
    longest = int(corpus.lengths.max(initial=1))
    check_sizes(loss, longest, corpus.largest_id)
    probe = probe_pack([corpus.example(i) for i in range(min(len(corpus), 3))])
    check_paths(loss, probe, machine.precision, longest, TOKENS_PER_PACK)
    loss.use_segments(False)
    return Served(loss, wrapped)


def prompts_of(
    corpus: Corpus, tokenizer: Tokenizer, stop_ids: frozenset[int], count: int
) -> list[Prompt]:
    """The prompts of up to `count` examples, taken evenly over the corpus; plain texts have none."""
    found: list[Prompt] = []
    stride = max(len(corpus) // max(count, 1), 1)
    for number in range(0, len(corpus), stride):
        if len(found) == count:
            break
        prompt = prompt_of(corpus.example(number), tokenizer, stop_ids)
        if prompt is not None:
            found.append(prompt)
    return found


def judge(served: Served, asked: Asked, machine: Machine) -> Judgement:
    """Loss over all rows, answers to the prompts and their metrics."""
    served.loss.use_segments(True)
    try:
        numbers = held_out_loss(served.loss, asked.corpus, TOKENS_PER_PACK, machine.autocast)
    finally:
        served.loss.use_segments(False)
    judgement = Judgement(numbers)
    if not asked.prompts:
        return judgement
    with machine.autocast():
        judgement.samples = answer(
            served.model,
            asked.tokenizer,
            asked.prompts,
            sorted(asked.stop_ids),
            asked.new_tokens,
            asked.seed,
        )
    outputs = [sample.output for sample in judgement.samples]
    references = [sample.reference for sample in judgement.samples]
    prompts = [sample.prompt for sample in judgement.samples]
    judgement.scores = score(asked.metrics, prompts, outputs, references)
    judgement.numbers |= {name: fmean(values) for name, values in judgement.scores.items()}
    judgement.numbers["ended"] = fmean(sample.ended for sample in judgement.samples)
    return judgement


def distance(
    tuned: Forward, base: Forward, prompts: Sequence[Prompt], samples: Sequence[Sample]
) -> float:
    """KL(tuned || base) per token in nats, on the answers that the tuned model gave."""
    said = [
        Continuation(prompt.ids, sample.ids)
        for prompt, sample in zip(prompts, samples, strict=True)
        if sample.ids
    ]
    return divergence(tuned, base, said)
