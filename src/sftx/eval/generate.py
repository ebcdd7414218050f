"""Answers of a model to held-out prompts, as a server would give them.

The prompts are token ids of encoded examples: all that stands before the last output. They are the
ids that a server sends, since the encoder writes them so. Sampling settings and stop tokens are
those of the model's generation_config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sftx import distributed
from sftx.data.tokenizer import Tokenizer
from sftx.eval.generation_memory import rows_at_once
from sftx.eval.sampling import AS_SAVED, Sampling, generation_config
from sftx.model.checks.start import evaluating
from sftx.model.save import serving_config
from sftx.types import Example

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

Arguments = Mapping[str, Any]
"""Arguments of transformers' `generate`, by name."""
AS_SERVED: Arguments = {}
"""No arguments of `generate` beside the generation_config."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, and the answer of the data to it. `number`: of its example in the corpus."""

    ids: list[int]
    text: str
    reference: str
    number: int = -1


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of the model."""

    prompt: str
    output: str
    reference: str
    ended: bool  # by a stop token of its own; False = cut at the length limit
    ids: list[int]  # of the tokens generated, the stop token included

    def as_record(self, step: int) -> dict[str, object]:
        """A line of samples.jsonl."""
        return {
            "step": step,
            "prompt": self.prompt,
            "output": self.output,
            "reference": self.reference,
            "ended": self.ended,
            "tokens": len(self.ids),
        }


def prompt_of(example: Example, tokenizer: Tokenizer, stop_ids: Set[int]) -> Prompt | None:
    """The prompt before the last output of an example, and that output without the token of
    `stop_ids` that ends it.

    None where fewer than two tokens stand before that output: they are no question (the first token
    of a plain text carries no weight, since nothing stands before it).
    """
    said = example.said
    last = int(np.flatnonzero(said)[-1]) if said.any() else 0
    context = np.flatnonzero(~said[:last])
    begin = int(context[-1]) + 1 if len(context) else 0
    if begin < 2:
        return None
    ids = [int(i) for i in example.ids[:begin]]
    output = [int(i) for i in example.ids[begin : last + 1]]
    while output and output[-1] in stop_ids:
        output.pop()
    return Prompt(ids, tokenizer.decode(ids), tokenizer.decode(output))


def answer(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
    sampling: Sampling = AS_SAVED,
    settings: Arguments = AS_SERVED,
    free: int | None = None,
) -> list[Sample]:
    """One answer to each prompt, in their order, by transformers' own `generate`. `settings` are
    arguments of it that come before those of the generation_config.

    Prompts of about equal length are answered together, padded at the left, as many as `free` bytes
    hold (the same on all ranks; None: as much as it takes). Several ranks share such groups, and
    all get all answers, which do not depend on how many ranks there are. Where the
    generation_config or `sampling` samples, `seed` decides what is drawn; the state of the random
    numbers outside is not touched. `stop` is asked between groups; where it says so, [] is returned.
    """
    stops = serving_config(model, None, list(stop_ids)).eos_token_id
    config = generation_config(model, stops or [], max_new_tokens, sampling)
    config.num_return_sequences = 1
    others = config.update(**settings)  # what is no part of the configuration
    new = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64)
    counts = torch.zeros(len(prompts), dtype=torch.int64)
    itemsize = _itemsize(model)

    def most(longest: int) -> int:
        return rows_at_once(model.config, longest, max_new_tokens, itemsize, free)

    groups = list(_groups([len(prompt.ids) for prompt in prompts], most))
    ranks = distributed.world_size()
    cache_was_used = model.config.use_cache
    with evaluating(model), torch.no_grad(), torch.random.fork_rng():
        model.config.use_cache = True
        try:
            for first in range(0, len(groups), ranks):
                if stop():
                    return []
                number = first + distributed.rank()
                is_mine = number < len(groups)
                # Where the model is in shards, a rank without a group takes part all the same.
                members = groups[number] if is_mine else groups[0][-1:]
                torch.manual_seed(seed + number)
                answers = _generated(model, config, others, [prompts[i].ids for i in members])
                for i, ids in zip(members if is_mine else (), answers, strict=False):
                    new[i, : len(ids)] = torch.tensor(ids)
                    counts[i] = len(ids)
        finally:
            model.config.use_cache = cache_was_used
    distributed.all_reduce_sum(new)
    distributed.all_reduce_sum(counts)
    samples: list[Sample] = []
    for number, prompt in enumerate(prompts):
        ids = new[number, : int(counts[number])].tolist()
        samples.append(_sample(prompt, ids, config, tokenizer))
    return samples


def _itemsize(model: PreTrainedModel) -> int:
    """Bytes of a number in the keys and values that the model makes here."""
    parameter = next(model.parameters())
    kind = parameter.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind).itemsize
    return parameter.dtype.itemsize


def _groups(lengths: Sequence[int], most: Callable[[int], int]) -> Iterator[list[int]]:
    """Numbers of prompts to be answered together, the longest first, so that memory runs out at once
    if it does. `most`: how many of a length at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = most(lengths[order[start]])
        yield order[start : start + count]
        start += count


def _generated(
    model: PreTrainedModel,
    config: GenerationConfig,
    others: Arguments,
    prompts: Sequence[list[int]],
) -> list[list[int]]:
    """The new tokens of each prompt, padding and all that follows a stop token cut off."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), config.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    device = next(model.parameters()).device
    out = model.generate(  # pyright: ignore[reportCallIssue] - transformers adds it to causal models
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        **others,
        synced_gpus=distributed.is_joined(),
    )
    assert isinstance(out, torch.Tensor)
    return [_until_stop(row, config) for row in out[:, longest:].tolist()]


def _until_stop(ids: list[int], config: GenerationConfig) -> list[int]:
    stops = set(config.eos_token_id or ())
    for at, token in enumerate(ids):
        if token in stops:
            return ids[: at + 1]
    return ids


def _sample(
    prompt: Prompt, new: list[int], config: GenerationConfig, tokenizer: Tokenizer
) -> Sample:
    ended = bool(new) and new[-1] in set(config.eos_token_id or ())
    said = new[:-1] if ended else new
    return Sample(prompt.text, tokenizer.decode(said), prompt.reference, ended, new)
