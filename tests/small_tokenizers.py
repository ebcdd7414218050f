"""Real tokenizers, built in a moment: one of each kind that treats edges of texts differently."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from sftx.data.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog. What is 2+2? It is 4, I think.\n\nUser: "
    "hello\nAssistant: yes\n",
    "system user assistant think tool call result answer question שלום 🙂 café naïve weather in "
    "Paris\n \n  \n\n",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PLAIN_ADDED = ["<think>", "</think>"]


@cache
def _trained(kind: str, adds_bos: bool, adds_eos: bool) -> str:
    if kind == "byte_level":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    # "metaspace": the first text gets a mark of its own, as in the SentencePiece family
    else:
        backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
        )
        alphabet = []
    special = SPECIAL + ([f"<0x{i:02X}>" for i in range(256)] if kind == "metaspace" else [])
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if kind == "metaspace":
        state = json.loads(backend.to_str())
        for token in special[len(SPECIAL) :]:
            state["model"]["vocab"][token] = max(state["model"]["vocab"].values()) + 1
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.add_tokens([AddedToken(text, normalized=False) for text in PLAIN_ADDED])
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    single = f"{'<s> ' if adds_bos else ''}$A{' </s>' if adds_eos else ''}"
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    return backend.to_str()


def backend(
    kind: str = "byte_level",
    adds_bos: bool = False,
    adds_eos: bool = False,
    strips: tuple[str, ...] = (),
) -> tokenizers.Tokenizer:
    """A fresh copy of a small trained tokenizer: `byte_level` or `metaspace`. The tokens that
    `strips` names are special, and take the white space behind them along.
    """
    made = tokenizers.Tokenizer.from_str(_trained(kind, adds_bos, adds_eos))
    made.add_special_tokens([AddedToken(text, rstrip=True, normalized=False) for text in strips])
    return made


def ours(
    kind: str = "byte_level",
    *,
    adds_bos: bool = False,
    adds_eos: bool = False,
    **special: str | None,
) -> Tokenizer:
    """A small tokenizer as sftx sees it. Special tokens by name; None leaves one out."""
    named = {"bos_token": "<s>", "eos_token": "</s>", **special}
    return Tokenizer(
        backend(kind, adds_bos, adds_eos), {k: v for k, v in named.items() if v is not None}, {}
    )


def theirs(kind: str = "byte_level", **options: Any) -> Any:
    """The same tokenizer as transformers sees it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend(kind, **options), bos_token="<s>", eos_token="</s>"
    )
