"""Tiny random models, a tokenizer with one token per byte, and rows: made here, nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
VOCABULARY = len(SPECIAL) + 256
POSITIONS = 256
WORDS = ["river", "stone", "lamp", "seven", "orchard", "wind", "paper", "tower", "salt", "morning", "copper", "fox"]


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """A fast transformers tokenizer."""
    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw: Any = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )
    made.chat_template = template
    return made


def model(dropout: float = 0.0, vocabulary: int = VOCABULARY, width: int = 32) -> Any:
    """GPT-2 where dropout is wanted (it has dropout everywhere), else Llama; two layers, always the same weights."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2}
    config: Any
    if dropout:
        rates: dict[str, Any] = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        config = transformers.GPT2Config(n_embd=width, n_layer=2, n_head=4, n_positions=POSITIONS, **rates, **common)
    else:
        config = transformers.LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            initializer_range=0.1,
            tie_word_embeddings=True,
            **common,
        )
    return transformers.AutoModelForCausalLM.from_config(config)


def folder(path: Path, template: str | None = TEMPLATE, **changes: Any) -> str:
    """A model folder with its tokenizer, as `model.path` wants it."""
    model(**changes).save_pretrained(path)
    tokenizer(template).save_pretrained(path)
    return str(path)


def text(rng: random.Random, length: int) -> str:
    """Words, cut off at `length` characters."""
    return " ".join(rng.choice(WORDS) for _ in range(length // 3 + 1))[:length]


def pairs(count: int, shortest: int = 2, longest: int = 60) -> list[dict[str, str]]:
    """Rows of unequal length, always the same."""
    rng = random.Random(0)
    return [
        {"prompt": f"{i}: {text(rng, rng.randint(4, 16))}", "completion": text(rng, rng.randint(shortest, longest))}
        for i in range(count)
    ]
