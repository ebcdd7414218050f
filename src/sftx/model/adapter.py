"""Low-rank adapters through peft: attach, count, save, merge."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from sftx.config import Adapter
from sftx.types import UserError


def attach(model: PreTrainedModel, adapter: Adapter, seed: int) -> PeftModel | None:
    """Put the adapter into `model` (in place) and freeze the rest; None when all weights train.

    `seed` decides the adapter's first weights. Raises UserError when `targets` names no module of the model.
    """
    if adapter.method == "none":
        return None
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType] - a float is fine
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        use_rslora=adapter.method == "rslora",
        use_dora=adapter.method == "dora",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"adapter.targets: {adapter.targets!r} does not fit {type(model).__name__}: {error}") from error
    assert isinstance(wrapped, PeftModel)
    return wrapped


def trainable(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    counts = [(p.numel() if p.requires_grad else 0, p.numel()) for p in model.parameters()]
    return sum(c[0] for c in counts), sum(c[1] for c in counts)


def merge(adapter_folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    """The adapter of `adapter_folder` added into the weights of `base` (a freshly loaded model)."""
    merged = PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()  # pyright: ignore[reportCallIssue]
    assert isinstance(merged, PreTrainedModel)
    return merged
