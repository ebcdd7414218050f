"""Dialogues and prompts as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers.tokenization_utils_base import BatchEncoding

from sftx.compat.trlx.pipeline import BasePipeline, BaseRolloutStore, register_datapipeline
from sftx.compat.trlx.rl import by_name
from sftx.types import UserError

__getattr__ = by_name  # the stores of reinforcement learning
IGNORED = -100
"""The label of a token that is not a target."""


@dataclass
class DialogMessage:
    """One phrase of a dialogue as token ids; outputs are targets, prompts are not."""

    is_output: bool
    tokens: tuple[int, ...]


def start_token(tokenizer: Any) -> str:
    """The token that stands before a text with no prompt: BOS, or EOS where there is no BOS."""
    return tokenizer.bos_token or tokenizer.eos_token


def tokenize_dialogue(
    dialogue: str | Sequence[str], tokenizer: Any, max_length: int = 2048
) -> list[DialogMessage]:
    """Tokenise (prompt, output, prompt, output, ...), each phrase alone, and cut it to `max_length`
    tokens.

    A string is short for (BOS, string). EOS is added to the last output. Tokens are cut away on the
    tokenizer's `truncation_side`; where that leaves an output at the front, BOS is put before it,
    within `max_length`. Raises UserError where the dialogue is anything else, such as a dictionary.
    """
    phrases = (
        [start_token(tokenizer), dialogue] if isinstance(dialogue, str) else _phrases(dialogue)
    )
    if not phrases[-1].endswith(tokenizer.eos_token):
        phrases[-1] += tokenizer.eos_token
    tokens = [tokenizer(phrase, add_special_tokens=False).input_ids for phrase in phrases]
    kept = _cut(tokens, max_length, tokenizer.truncation_side == "left")
    messages = [DialogMessage(i % 2 == 1, tuple(ids)) for i, ids in enumerate(kept) if ids]
    if messages and messages[0].is_output:
        if sum(len(message.tokens) for message in messages) >= max_length:
            if tokenizer.truncation_side == "left":
                messages[0].tokens = messages[0].tokens[1:]
            else:
                messages[-1].tokens = messages[-1].tokens[:-1]
        start = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )
        messages.insert(0, DialogMessage(False, (start,)))
    return messages


def _phrases(dialogue: Any) -> list[str]:
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


def _cut(phrases: list[list[int]], max_length: int, from_left: bool) -> list[list[int]]:
    """The first (or last) `max_length` tokens, phrase by phrase."""
    room = max_length
    kept: list[list[int]] = []
    for ids in reversed(phrases) if from_left else phrases:
        part = (ids[max(len(ids) - room, 0) :] if from_left else ids[:room]) if room > 0 else []
        room -= len(part)
        kept.append(part)
    return kept[::-1] if from_left else kept


class DialogStore(BaseRolloutStore):
    """Dialogues as `input_ids`, `attention_mask` and `labels`, of which prompts' are -100."""

    def __init__(self, dialogs: Sequence[Sequence[DialogMessage]], tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        for dialog in dialogs:
            ids = [token for message in dialog for token in message.tokens]
            labels = [
                token if message.is_output else IGNORED
                for message in dialog
                for token in message.tokens
            ]
            self.history.append(
                {
                    "input_ids": torch.tensor(ids, dtype=torch.long),
                    "attention_mask": torch.ones(len(ids), dtype=torch.bool),
                    "labels": torch.tensor(labels, dtype=torch.long),
                }
            )

    def create_loader(self, batch_size: int, shuffle: bool = False, **kwargs: Any) -> DataLoader:
        """Batches padded on the tokenizer's `padding_side`; padding has label -100 and attention 0."""

        def collate(elements: list[dict[str, Tensor]]) -> BatchEncoding:
            fill = {"input_ids": _pad_id(self.tokenizer), "attention_mask": 0, "labels": IGNORED}
            side = self.tokenizer.padding_side
            return BatchEncoding(
                {
                    key: _padded([e[key] for e in elements], value, side)
                    for key, value in fill.items()
                }
            )

        return DataLoader(
            self, batch_size=batch_size, collate_fn=collate, shuffle=shuffle, **kwargs
        )


@register_datapipeline
class PromptPipeline(BasePipeline):
    """Texts as token ids, cut to `max_prompt_length` on the tokenizer's `truncation_side`.

    `prompts` are texts, or dictionaries with `"prompt"` and whatever else should reach the metric
    function.
    """

    def __init__(
        self,
        prompts: Sequence[str] | Sequence[dict[str, Any]],
        max_prompt_length: int,
        tokenizer: Any,
        add_special_tokens: bool = False,
    ) -> None:
        super().__init__()
        if max_prompt_length < 1:
            raise UserError(
                f"no room for a prompt: {max_prompt_length} tokens (train.seq_length - "
                "max_new_tokens)"
            )
        extra = [
            {k: v for k, v in p.items() if k != "prompt"} if isinstance(p, dict) else {}
            for p in prompts
        ]
        texts = [p.get("prompt") if isinstance(p, dict) else p for p in prompts]
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(
                    f"prompts[{i}]: a text, or a dictionary with a text under `prompt`, is needed"
                )
        encoded = tokenizer(
            texts,
            truncation=True,
            padding=False,
            max_length=max_prompt_length,
            add_special_tokens=add_special_tokens,
        )
        self.tokenizer = tokenizer
        self.prompts = [
            {"input_ids": ids, "attention_mask": mask, **more}
            for ids, mask, more in zip(
                encoded["input_ids"], encoded["attention_mask"], extra, strict=True
            )
        ]

    def __getitem__(self, ix: int) -> dict[str, Any]:
        return self.prompts[ix]

    def __len__(self) -> int:
        return len(self.prompts)

    def create_loader(
        self,
        batch_size: int,
        shuffle: bool = False,
        sampler: Sampler | None = None,
        drop_last: bool = False,
        **_: Any,
    ) -> DataLoader:
        """Batches of `input_ids` and `attention_mask`, padded on the tokenizer's `padding_side`,
        and the extra keys.
        """

        def collate(elements: list[dict[str, Any]]) -> BatchEncoding:
            side = self.tokenizer.padding_side
            ids = [torch.tensor(e["input_ids"], dtype=torch.long) for e in elements]
            batch: dict[str, Any] = {
                "input_ids": _padded(ids, _pad_id(self.tokenizer), side),
                "attention_mask": _padded([torch.ones_like(row) for row in ids], 0, side),
            }
            extra = [key for key in elements[0] if key not in batch]
            return BatchEncoding(batch | {key: [e[key] for e in elements] for key in extra})

        return DataLoader(
            self,
            batch_size=batch_size,
            collate_fn=collate,
            shuffle=shuffle,
            sampler=sampler,
            drop_last=drop_last,
        )


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _padded(rows: list[Tensor], value: int, side: str) -> Tensor:
    """[len(rows), longest], int64."""
    out = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, slice(out.shape[1] - len(row), None) if side == "left" else slice(len(row))] = (
            row.long()
        )
    return out
