"""Tiny models and tokenizers whose GGUF files tests write and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sftx.gguf.write import write_gguf

TEXTS = (
    "river stone lamp seven",
    "  two  spaces\n\nand lines ",
    "In 2024, 12345 said: don't!",
    "שלום 🙂 naïve 日本語",
    "",
    "a",
    "<|user|>stone<|end|>\n<|assistant|>",
)
CORPUS = [" ".join(tiny.WORDS), "the wind said: don't go to the tower in 1987"] * 3


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, special tokens before the others and one after."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=299, special_tokens=tiny.SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return _fast(raw)


def sentence_piece(space: bool) -> PreTrainedTokenizerFast:
    """BPE over characters with a token for every byte, as Llama 2 (`space`) and Gemma have it."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*tiny.SPECIAL, "<unk>", *bytes_], show_progress=False
    )
    raw = Tokenizer(models.BPE())
    spaces = normalizers.Replace(" ", "▁")
    steps = [normalizers.Prepend("▁"), spaces] if space else [spaces]
    raw.normalizer = normalizers.Sequence(steps) if space else spaces
    raw.train_from_iterator(CORPUS, trainer)
    state = json.loads(raw.to_str())
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    names = {*tiny.SPECIAL, "<unk>"}
    state["added_tokens"] = [each for each in state["added_tokens"] if each["content"] in names]
    # Every cut of a token is a merge, as where merges come from SentencePiece.
    vocabulary, merges, rank = state["model"]["vocab"], [], {}
    for left, right in state["model"]["merges"]:
        rank.setdefault(left + right, len(rank))
    for token in sorted(rank, key=lambda each: rank[each]):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += [list(cut) for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
    state["model"]["merges"] = merges
    return _fast(Tokenizer.from_str(json.dumps(state)))


def _fast(raw: Tokenizer) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=tiny.SPECIAL[3:],
    )
    fast.chat_template = tiny.CHAT_TEMPLATE
    return fast


def folder(path: Path, family: str = "Llama", tokenizer: Any = None, **changes: Any) -> Path:
    """A Hugging Face folder with a tokenizer that merges."""
    tokenizer = tokenizer or byte_level()
    rows = len(tokenizer) + 5
    model = tiny.model(family, **{"vocab_size": rows, "tie_word_embeddings": True, **changes})
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases that are all alike would hide mistakes
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def gguf_of(source: Path, model: PreTrainedModel, file: Path, kind: str = "F16") -> Path:
    """The model and the tokenizer in `source` as a GGUF file."""
    state = model.state_dict()
    write_gguf(
        file,
        kind,
        json.loads((source / "config.json").read_text()),
        source,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda name: state[name].float().numpy(),
        "tiny",
    )
    return file
