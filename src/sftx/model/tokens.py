"""Rows in the embeddings and the head for the tokens a run adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sftx.types import UserError

NOISE = 0.02
"""Deviation of a new row from the mean of the others, relative to theirs: enough to tell new tokens
apart.
"""


def add_rows(model: PreTrainedModel, added_token_ids: dict[int, bool], seed: int) -> list[str]:
    """Give every id of `taught` (id -> whether it is new) a row, growing the matrices where needed
    (in place).

    New rows are mean + NOISE * std * N(0, 1) of the rows of known tokens, dimension by dimension,
    drawn by `seed`. Returns what was done, in words. Raises UserError when rows would be needed for
    tokens that are not listed.
    """
    if not added_token_ids:
        return []
    rows, needed = _matrices(model)[0].shape[0], max(added_token_ids) + 1
    if unlisted := sorted(set(range(rows, needed)) - set(added_token_ids)):
        raise UserError(
            f"model.add_tokens: tokens beyond the model's {rows} embeddings are not listed: ids "
            f"{unlisted[:8]} ..."
        )
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    new = sorted(i for i, is_new in added_token_ids.items() if is_new or i >= rows)
    generator = torch.Generator().manual_seed(seed % 2**63)
    for tensor in _matrices(model) if new else []:
        known = tensor[: min(new[0], rows)].float()
        noise = torch.randn(len(new), *tensor.shape[1:], generator=generator, device="cpu").to(
            tensor.device
        )
        tensor[new] = (known.mean(0) + NOISE * known.std(0) * noise).to(tensor.dtype)
    grown = f"; the embeddings grew from {rows:,} to {needed:,} rows" if needed > rows else ""
    return [
        f"{len(added_token_ids)} listed tokens have rows that train, {len(new)} of them new{grown}"
    ]


def _matrices(model: Any) -> list[Tensor]:
    """The embeddings, and where they are not tied the head's matrix and bias; without gradients."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = (
        []
        if head is None or head.weight is embeddings.weight
        else [head.weight, getattr(head, "bias", None)]
    )
    return [tensor.detach() for tensor in (embeddings.weight, *own) if tensor is not None]
