"""Tiny models and examples that tests share: made in process, nothing downloaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sftx.data.encoder import Encoded
from sftx.data.store.block import make_block
from sftx.data.store.corpus import Corpus, Origin, Part
from sftx.types import Example

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|tool|>",
]


def runs_one_at_a_time(family: str) -> bool:
    """Whether the installed transformers is known to lack what keeps packed segments of a family
    apart, so that they run one at a time: exact, but slower.
    """
    return family == "Gemma2" and transformers.__version__.startswith("5.17.")


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level: one token per byte after the special ones, so every text has a known length."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


WORDS = [
    "river",
    "stone",
    "lamp",
    "seven",
    "orchard",
    "wind",
    "paper",
    "tower",
    "salt",
    "morning",
    "copper",
    "fox",
]


def text(rng: random.Random, length: int) -> str:
    """Words, cut off at `length` characters."""
    return " ".join(rng.choice(WORDS) for _ in range(length // 3 + 1))[:length]


def pairs(count: int, shortest: int = 2, longest: int = 60) -> list[dict[str, str]]:
    """Rows of unequal length, always the same."""
    rng = random.Random(0)
    return [
        {
            "prompt": f"{i}: {text(rng, rng.randint(4, 16))}",
            "completion": text(rng, rng.randint(shortest, longest)),
        }
        for i in range(count)
    ]


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings `base` with `changes`: of a section only what is named."""
    found = dict(base)
    for key, value in changes.items():
        is_section = isinstance(base.get(key), dict)
        found[key] = {**base[key], **value} if is_section else value
    return found


def model(
    family: str = "Llama", vocab_size: int = 264, seed: int = 0, **changes: Any
) -> transformers.PreTrainedModel:
    """A randomly initialised causal LM of two small layers."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, "vocab_size": vocab_size, "eos_token_id": 2, **changes}
    )
    return transformers.AutoModelForCausalLM.from_config(config).train()


def embeddings(model: transformers.PreTrainedModel) -> torch.nn.Embedding:
    """The module that turns token ids into vectors."""
    found = model.get_input_embeddings()
    assert isinstance(found, torch.nn.Embedding)
    return found


def head(model: transformers.PreTrainedModel) -> torch.nn.Linear:
    """The module that turns hidden states into logits."""
    found = model.get_output_embeddings()
    assert isinstance(found, torch.nn.Linear)
    return found


def folder(path: Path, chat: bool = True, family: str = "Llama", **changes: Any) -> str:
    """A model folder on disk, as `model.path` wants it."""
    model(family, **{"tie_word_embeddings": True, **changes}).save_pretrained(path)
    tokenizer(chat).save_pretrained(path)
    return str(path)


def examples(lengths: list[int], vocab_size: int = 264, seed: int = 0) -> list[Example]:
    """Random tokens with real-valued weights, about half of them 0."""
    rng = np.random.RandomState(seed)
    made = []
    for length in lengths:
        weights = ((rng.rand(length) < 0.5) * rng.rand(length) * 2).astype(np.float32)
        weights[-1], weights[0] = 1.0, 0.0
        made.append(Example(rng.randint(3, vocab_size, length).astype(np.int32), weights))
    return made


def naive_loss(reference: torch.nn.Module, data: list[Example]) -> torch.Tensor:
    """sum(w * nll) / sum(w), one example at a time, in the model's own forward: no padding, no
    packing.
    """
    total, weight_sum = torch.zeros((), dtype=torch.float64), 0.0
    for example in data:
        ids = torch.tensor(example.ids.astype(np.int64))[None]
        logits = reference(input_ids=ids, use_cache=False).logits[0].double()
        weights = torch.tensor(example.weights[1:].astype(np.float64))
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        total = total + (nll * weights).sum()
        weight_sum += float(weights.sum())
    return total / weight_sum


def gradient_difference(model: torch.nn.Module, reference: torch.nn.Module) -> float:
    """Relative L2 difference of all gradients, in float64."""
    difference = norm = 0.0
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None
            difference += float(((ours.grad.double() - theirs.grad) ** 2).sum())
            norm += float((theirs.grad**2).sum())
    return (difference / norm) ** 0.5


def corpus(examples: list[Example]) -> Corpus:
    """A corpus held in memory, one row per example."""
    block = make_block([(i, i, Encoded([example])) for i, example in enumerate(examples)])
    return Corpus([Part(block, 0, 0, 1)], ["memory"], [Origin("memory", "row")])
