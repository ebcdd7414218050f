"""Dialogues and prompts as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sftx.compat.trlx.names import by_name
from sftx.compat.trlx.pipeline import BasePipeline, BaseRolloutStore, register_datapipeline
from sftx.types import UserError

__getattr__ = by_name  # the stores of reinforcement learning
IGNORED = -100
"""The label of a token that is not a target."""


@dataclass
class DialogMessage:
    """One phrase of a dialogue as token ids; outputs are targets, prompts are not."""

    is_output: bool
    tokens: tuple[int, ...]


def start_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that stands before a text with no prompt: BOS, or EOS where there is no BOS."""
    return _text_of(tokenizer.bos_token or tokenizer.eos_token, "BOS or EOS")


def tokenize_dialogue(
    dialogue: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int = 2048
) -> list[DialogMessage]:
    """Tokenise (prompt, output, prompt, output, ...), each phrase alone, up to `max_length` tokens.

    A string is short for (BOS, string). EOS is added to the last output. Tokens are cut away on the
    tokenizer's `truncation_side`; where that leaves an output at the front, BOS is put before it,
    within `max_length`. Raises UserError where the dialogue is anything else, such as a dictionary.
    """
    if isinstance(dialogue, str):
        dialogue = [start_token(tokenizer), dialogue]
    phrases = _phrases(dialogue)
    eos = _text_of(tokenizer.eos_token, "EOS")
    if not phrases[-1].endswith(eos):
        phrases[-1] += eos
    tokens: list[tuple[int, int]] = []  # the number of the phrase, and a token of it
    for number, phrase in enumerate(phrases):
        ids = tokenizer(phrase, add_special_tokens=False).input_ids
        tokens += [(number, token) for token in ids]
    tokens = _cut(tokens, max_length, tokenizer.truncation_side)
    start: list[DialogMessage] = []
    if tokens and tokens[0][0] % 2:
        tokens = _cut(tokens, max_length - 1, tokenizer.truncation_side)
        start_id = tokenizer.convert_tokens_to_ids(start_token(tokenizer))
        assert isinstance(start_id, int), "one token has one id"
        start = [DialogMessage(False, (start_id,))]
    parts = groupby(tokens, key=lambda pair: pair[0])
    messages = [
        DialogMessage(number % 2 == 1, tuple(token for _, token in part)) for number, part in parts
    ]
    return start + messages


def _text_of(token: object, name: str) -> str:
    if not isinstance(token, str):
        raise UserError(f"the tokenizer has no {name} token")
    return token


def _phrases(dialogue: object) -> list[str]:
    """The texts of a dialogue."""
    if isinstance(dialogue, dict):
        keys = ", ".join(map(str, dialogue))
        raise UserError(
            f"found a dictionary ({keys}); give a text, or the values as a list: [prompt, output, "
            "...]"
        )
    if not isinstance(dialogue, Iterable):
        raise UserError(
            f"found {type(dialogue).__name__}; give a text, or a list: [prompt, output, ...]"
        )
    phrases = list(dialogue)
    for phrase in phrases:
        if not isinstance(phrase, str):
            raise UserError(f"a phrase of a dialogue must be a text; found {type(phrase).__name__}")
    if len(phrases) % 2 or not phrases:
        raise UserError(
            "Dialogue must have an even number of phrases, alternating prompt and output; found "
            f"{len(phrases)}"
        )
    return phrases


def _cut(tokens: list[tuple[int, int]], length: int, side: str) -> list[tuple[int, int]]:
    """The last `length` tokens where the rest is cut on the left, else the first."""
    if side == "left":
        return tokens[max(len(tokens) - length, 0) :]
    return tokens[:length]


class DialogStore(BaseRolloutStore):
    """Dialogues as `input_ids`, `attention_mask` and `labels`, of which prompts' are -100."""

    def __init__(
        self, dialogs: Sequence[Sequence[DialogMessage]], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        for dialog in dialogs:
            ids: list[int] = []
            labels: list[int] = []
            for message in dialog:
                ids += message.tokens
                labels += message.tokens if message.is_output else [IGNORED] * len(message.tokens)
            element = {
                "input_ids": torch.tensor(ids, dtype=torch.long),
                "attention_mask": torch.ones(len(ids), dtype=torch.bool),
                "labels": torch.tensor(labels, dtype=torch.long),
            }
            self.history.append(element)

    def create_loader(
        self, batch_size: int, shuffle: bool = False, **options: Any
    ) -> DataLoader[Any]:
        """Batches padded on the tokenizer's `padding_side`, with label -100 and attention 0."""
        collate = partial(_collate, self.tokenizer, {"labels": IGNORED})
        return DataLoader(self, batch_size, shuffle, collate_fn=collate, **options)


@register_datapipeline
class PromptPipeline(BasePipeline):
    """Texts as token ids, cut to `max_prompt_length` on the tokenizer's `truncation_side`.

    `prompts` are texts, or dictionaries with `"prompt"` and whatever else should reach the metric
    function.
    """

    def __init__(
        self,
        prompts: Sequence[str | Mapping[str, object]],
        max_prompt_length: int,
        tokenizer: PreTrainedTokenizerBase,
        add_special_tokens: bool = False,
    ) -> None:
        super().__init__()
        if max_prompt_length < 1:
            raise UserError(
                f"no room for a prompt: {max_prompt_length} tokens (train.seq_length - "
                "max_new_tokens)"
            )
        self.tokenizer = tokenizer
        self.prompts: list[dict[str, Any]] = []
        texts: list[str] = []
        for i, prompt in enumerate(prompts):
            extra = dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}
            text = extra.pop("prompt", None)
            if not isinstance(text, str):
                raise UserError(
                    f"prompts[{i}]: a text, or a dictionary with a text under `prompt`, is needed"
                )
            texts.append(text)
            self.prompts.append(extra)
        encoded = tokenizer(
            texts,
            truncation=True,
            padding=False,
            max_length=max_prompt_length,
            add_special_tokens=add_special_tokens,
        )
        for i, extra in enumerate(self.prompts):
            tokens = {key: encoded[key][i] for key in ("input_ids", "attention_mask")}
            self.prompts[i] = {**tokens, **extra}

    def __getitem__(self, ix: int) -> dict[str, Any]:
        return self.prompts[ix]

    def __len__(self) -> int:
        return len(self.prompts)

    def create_loader(
        self, batch_size: int, shuffle: bool = False, **options: Any
    ) -> DataLoader[Any]:
        """Batches of tokens, padded on the tokenizer's `padding_side`; extra keys as lists."""
        collate = partial(_collate, self.tokenizer, {})
        return DataLoader(self, batch_size, shuffle, collate_fn=collate, **options)


def _collate(
    tokenizer: PreTrainedTokenizerBase, more: dict[str, int], elements: list[dict[str, Any]]
) -> BatchEncoding:
    """One batch: tokens, and the columns in `more`, padded with its values; others as lists."""
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    filled = {"input_ids": pad, "attention_mask": 0, **more}
    batch: dict[str, list[Any] | Tensor] = {
        key: [element[key] for element in elements] for key in elements[0]
    }
    for key, value in filled.items():
        rows = [torch.as_tensor(row, dtype=torch.long) for row in batch[key]]
        batch[key] = pad_sequence(
            rows, batch_first=True, padding_value=value, padding_side=tokenizer.padding_side
        )
    return BatchEncoding(batch)
