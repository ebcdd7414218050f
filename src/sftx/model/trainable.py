"""Which weights train: an adapter; or all, the last layers, or those whose names match. Rows for the
tokens that a run adds.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftx.model.adapter import attach
from sftx.model.architecture import beside_text
from sftx.model.mixture import describe_adapter
from sftx.settings.schema import Adapter, Model
from sftx.types import UserError

NOISE = 0.02
"""Deviation of a new row from the mean of the others, relative to theirs: enough to tell new tokens
apart.
"""


def choose_weights(
    model: PreTrainedModel,
    settings: Model,
    adapter: Adapter,
    seed: int,
    added_token_ids: dict[int, bool],
) -> tuple[PeftModel | None, list[str]]:
    """Add rows for `added_token_ids`, freeze what is to stay, put the adapter in; all in place.

    Returns the adapter around the model (None where there is none), and what was done, in words.
    """
    notes = add_rows(model, added_token_ids, seed)
    freeze(model, settings)
    other = beside_text(model)
    if other:
        count = sum(parameter.numel() for parameter in other.values())
        notes.append(
            f"{type(model).__name__}: its text part trains; {count:,} other parameters (first: "
            f"{next(iter(other))}) stay as they are"
        )
    adapted = attach(model, adapter, seed, sorted(added_token_ids))
    if adapted is not None:
        notes.append(describe_adapter(model))
    return adapted, notes


def freeze(model: PreTrainedModel, settings: Model) -> None:
    """Apply `model.unfrozen_layers`, `model.freeze` or `model.train_only`; UserError where one fits
    nothing.
    """
    if settings.unfrozen_layers is not None:
        _freeze_lower_layers(model, settings.unfrozen_layers)
    elif settings.train_only is not None:
        chosen = _matching(model, "train_only", settings.train_only)
        model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
    frozen = _matching(model, "freeze", settings.freeze or [])
    for parameter in (*frozen, *beside_text(model).values()):
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze: it matches every parameter, and nothing is left to train")
    if settings.add_tokens or settings.add_special_tokens:
        _refuse_frozen_rows(model)


def _refuse_frozen_rows(model: PreTrainedModel) -> None:
    rows: dict[str, Any] = {
        "embeddings": model.get_input_embeddings(),
        "head": model.get_output_embeddings(),
    }
    for name, module in rows.items():
        if not module.weight.requires_grad:
            raise UserError(
                f"model.add_tokens: the {name} of {type(model).__name__} would stay frozen, new "
                "rows included; let "
                "them train (model.unfrozen_layers, model.freeze, model.train_only), or train an "
                "adapter"
            )


def _matching(model: PreTrainedModel, field: str, patterns: list[str]) -> list[nn.Parameter]:
    """The parameters whose names match; tied ones go by each of their names."""
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise UserError(
                f"model.{field}: {pattern!r} matches no parameter of {type(model).__name__}; "
                "their names are like "
                f"{named[0][0]}, {named[len(named) // 2][0]} and {named[-1][0]}"
            )
    return [
        parameter
        for name, parameter in named
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _freeze_lower_layers(model: PreTrainedModel, unfrozen: int) -> None:
    count = model.config.get_text_config().num_hidden_layers
    if unfrozen > count:
        raise UserError(
            f"model.unfrozen_layers: found {unfrozen}, but {type(model).__name__} has {count} "
            "layers"
        )
    layers = next(
        (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None
    )
    if layers is None:
        raise UserError(
            f"model.unfrozen_layers: the layers of {type(model).__name__} were not found; use "
            "model.freeze"
        )
    modules: list[Any] = [*layers[: count - unfrozen], model.get_input_embeddings()]
    if unfrozen == 0:
        modules.append(model.get_output_embeddings())
    for module in modules:
        module.requires_grad_(False)


def add_rows(model: PreTrainedModel, added_token_ids: dict[int, bool], seed: int) -> list[str]:
    """Give every id of `added_token_ids` (id -> whether it is new) a row, growing the matrices where needed
    (in place).

    New rows are mean + NOISE * std * N(0, 1) of the rows of known tokens, dimension by dimension,
    drawn by `seed`. Returns what was done, in words. Raises UserError when rows would be needed for
    tokens that are not listed.
    """
    if not added_token_ids:
        return []
    rows = _matrices(model)[0].shape[0]
    needed = max(added_token_ids) + 1
    unlisted = sorted(set(range(rows, needed)) - set(added_token_ids))
    if unlisted:
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
        shape = (len(new), *tensor.shape[1:])
        noise = torch.randn(shape, generator=generator, device="cpu").to(tensor.device)
        drawn = known.mean(0) + NOISE * known.std(0) * noise
        tensor[new] = drawn.to(tensor.dtype)
    grown = f"; the embeddings grew from {rows:,} to {needed:,} rows" if needed > rows else ""
    return [
        f"{len(added_token_ids)} listed tokens have rows that train, {len(new)} of them new{grown}"
    ]


def _matrices(model: Any) -> list[Tensor]:
    """The embeddings, and where they are not tied the head's matrix and bias; without gradients."""
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
    own = (
        []
        if head is None or head.weight is embeddings.weight
        else [head.weight, getattr(head, "bias", None)]
    )
    return [tensor.detach() for tensor in (embeddings.weight, *own) if tensor is not None]
