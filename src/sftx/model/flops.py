"""Seconds that a run will take, from the products it cannot avoid and the speed of a layer on this
machine.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sftx.model.adapter import bare
from sftx.model.checkpointing import decoder_layers
from sftx.model.checks.stand_in import kinds_of_layers
from sftx.model.memory import MemoryEstimator
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.types import Pack

MOST_LAYERS = 8
"""Layers that are timed at most, where they follow one another without a pattern."""


def flops(loss: PackLoss, tokens: Any, targets: Any, squares: Any, recomputed: int = 0) -> Any:
    """FLOPs of `tokens` tokens with `targets` targets in segments whose squared lengths sum to
    `squares`; numbers, or arrays of them.

    Two per weight and token forward, two for the gradient of the input, two for that of a weight
    that trains; causal attention counts half of each square, 2 s^2 forward and twice that backward
    per layer and channel (PaLM, arXiv:2204.02311, appendix B, with the causal half). Experts count
    as if all were used.
    """
    layers = decoder_layers(loss.model)
    width = bare(loss.model.get_input_embeddings()).weight.shape[-1]
    body = sum(_flops_of(p) for p in layers.parameters() if p.ndim >= 2)
    for layer in list(layers)[:recomputed]:
        body += sum(2 * p.numel() for p in layer.parameters() if p.ndim >= 2)
    head = _flops_of(bare(loss.model.get_output_embeddings()).weight)
    attention = 6 * len(layers) * width * squares
    return body * tokens + head * targets + attention


def _flops_of(weight: Tensor) -> int:
    """FLOPs of a token in the products of a weight, forward and backward."""
    each = 6 if weight.requires_grad else 4
    return each * weight.numel()


def reached_speed(estimator: MemoryEstimator, pack: Pack) -> float | None:
    """FLOP/s that this machine reaches in the decoder layers of the model: how much longer two
    layers of random weights take than one (where layers are of several kinds, one of each more),
    forward and backward over `pack`, the best of three. None where the model's layers cannot be
    told.
    """
    best = [float("inf")] * 2
    paths = estimator.loss.paths
    at_once = paths.isolate or paths.padded
    period = _period(estimator.loss.model) if at_once else 0
    device = estimator.machine.device
    depths = (1, 1 + period) if period else ()
    for number, depth in enumerate(depths):
        loss, layers = estimator.shadow(depth)
        for tensor in (*layers.parameters(), *loss.buffers()):
            if tensor.is_floating_point():
                tensor.detach().normal_(std=0.02)
        # Its gradient has the size of the vocabulary.
        loss.model.get_input_embeddings().requires_grad_(False)
        inputs = to_tensors(pack, device)
        loss = loss.to(device)
        for _ in range(3):
            start = _now()
            with estimator.machine.autocast():
                loss.hidden(inputs).sum().requires_grad_().backward()
            best[number] = min(best[number], _now() - start)
    if not best[0] < best[1] < float("inf"):
        return None
    squares = sum(length**2 for length in np.diff(pack.cu_seqlens).tolist())
    work = flops(estimator.loss, len(pack.ids), 0, squares) * period / len(estimator.layers)
    return work / (best[1] - best[0])


def _period(model: PreTrainedModel) -> int:
    """After how many decoder layers the same kinds of layers come again, the first layer left
    out; at most `MOST_LAYERS`. 0 where the model has fewer than two.
    """
    kinds = kinds_of_layers(model)
    most = min(len(kinds) - 1, MOST_LAYERS)
    for period in range(1, most):
        if kinds[1:-period] == kinds[1 + period :]:
            return period
    return max(most, 0)


def _now() -> float:
    """Seconds; on a CPU those of this process by its threads, whatever else the machine does
    meanwhile.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()
