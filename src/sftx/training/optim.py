"""AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from sftx.config import Adapter, Optim

DEFAULT_LEARNING_RATE = {"none": 2e-5, "lora": 2e-4, "rslora": 2e-4, "dora": 2e-4}


def peak_learning_rate(optim: Optim, adapter: Adapter) -> float:
    """The learning rate that was set, or the default of the method."""
    return DEFAULT_LEARNING_RATE[adapter.method] if optim.learning_rate is None else optim.learning_rate


def learning_rate(step: int, num_steps: int, optim: Optim, peak: float) -> float:
    """Learning rate of update `step` (0-based) out of `num_steps`.

    Linear warm-up reaches the peak after `warmup` updates; the schedule would end at `final_ratio * peak` right after
    the last update.
    """
    warmup = round(optim.warmup * num_steps) if optim.warmup < 1 else int(optim.warmup)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match optim.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - progress
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            decay_steps = max(1, round(optim.decay * num_steps))
            factor = min(1.0, (num_steps - step) / decay_steps)
    return peak * (optim.final_ratio + (1 - optim.final_ratio) * factor if optim.schedule != "constant" else 1.0)


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; weight decay on matrices, never on norms, biases or embeddings."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_row = id(parameter) in embeddings or "trainable_tokens" in name
            is_matrix = parameter.ndim >= 2 and not is_row
            (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)
