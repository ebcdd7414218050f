"""Answers from a model: batched generation that stops where training taught it to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from sftx.model.checks import evaluating


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str | list[int]],
    max_new_tokens: int = 128,
    batch_size: int = 32,
    **sampling: Any,
) -> list[str]:
    """Continue each prompt and return only what was added, special tokens left out. Greedy unless `sampling` says else.

    A prompt is token ids, or a text that is tokenised as it stands (render a chat with its template first).
    Prompts are sorted by length and left-padded in batches; the answers come back in the order of the prompts.
    """
    encoded = [tokenizer(p, add_special_tokens=False)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": pad, **sampling}
    answers = [""] * len(encoded)
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            width = max(len(encoded[i]) for i in members)
            blank = [width - len(encoded[i]) for i in members]
            padded = [[pad] * room + encoded[i] for room, i in zip(blank, members, strict=True)]
            mask = torch.tensor([[0] * room + [1] * (width - room) for room in blank], device=model.device)
            ids = torch.tensor(padded, device=model.device)
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
            out = model.generate(**inputs, **settings)  # pyright: ignore[reportCallIssue]
            for row, i in zip(out[:, width:], members, strict=True):
                answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers
