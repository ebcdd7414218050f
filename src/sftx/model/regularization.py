"""What training adds around the cross-entropy: noise on the embeddings, and the balance of a
mixture's experts.

Both are defined for each segment alone, so that neither depends on how a step is cut into packs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sftx.settings.schema import Loss


def of_each_example(objective: Loss) -> str:
    """Why every example must be computed as a whole, by itself; empty where nothing asks for it."""
    if objective.neftune_alpha:
        return "loss.neftune_alpha draws noise for each example"
    if objective.router_aux:
        return "loss.router_aux balances the experts of each example"
    return ""


def embedding_noise(
    lengths: Sequence[int], hidden_size: int, alpha: float, seeds: Sequence[int]
) -> Tensor:
    """NEFTune's noise (arXiv:2310.05914) for segments of these `lengths`, float32[sum(lengths),
    hidden_size].

    Drawn on the CPU, so that the device does not change it. Uniform in +-alpha / sqrt(length *
    hidden_size); each segment draws from a stream of its own, begun by its seed.
    """
    parts = []
    for length, seed in zip(lengths, seeds, strict=True):
        bound = alpha / math.sqrt(length * hidden_size)
        generator = torch.Generator().manual_seed(seed % 2**63)
        part = torch.empty(length, hidden_size)
        part.uniform_(-bound, bound, generator=generator)
        parts.append(part)
    return torch.cat(parts)


def router_balance(
    router_logits: Sequence[Tensor], top_k: int, cu_seqlens: Tensor, share: Tensor
) -> Tensor:
    """sum_s share[s] * E * sum_e f[s, e] P[s, e], a float32 scalar (Switch Transformer, equations 4
    to 6).

    `router_logits`: one [T, E] per layer, before the softmax. Of segment s, over its tokens and all
    layers: f = mean choices of expert e among the `top_k`, P = mean probability of e. `cu_seqlens`
    int[n + 1], `share` float32[n].
    """
    lengths = cu_seqlens.diff().long()
    tokens, experts = router_logits[0].shape
    numbers = torch.arange(len(lengths), device=lengths.device)
    segment = torch.repeat_interleave(numbers, lengths, output_size=tokens)
    chosen = torch.zeros(len(lengths), experts, device=lengths.device)
    total = torch.zeros_like(chosen)
    for logits in router_logits:
        probability = torch.softmax(logits.float(), dim=-1)
        best = probability.topk(top_k).indices
        choice = torch.zeros_like(probability).scatter_(-1, best, 1.0)
        chosen.index_add_(0, segment, choice)
        total = total.index_add(0, segment, probability)
    rows = (lengths * len(router_logits))[:, None]
    products = chosen / rows * total / rows
    return (share * experts * products.sum(-1)).sum()
