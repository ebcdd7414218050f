"""A mixture's experts for a rehearsal without contents: products of the same sizes, without a
choice.

Which tokens an expert gets depends on data that fake tensors do not have. How much memory the
experts take does not: every token goes to as many of them as the router chooses. Here all go
through the weights of the first one; its gradient has the shape of all.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn


def stand_in_for_experts(model: nn.Module) -> None:
    """Let the experts of `model` that transformers computes by its own grouped products do so
    without a choice.
    """
    for module in model.modules():
        if "_is_expert_parallel" in vars(
            module
        ):  # the mark of transformers' `use_experts_implementation`
            module.forward = partial(_forward, module)


def _forward(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """`hidden` [N, h], `chosen` and `weights` [N, K] -> [N, h]; as transformers'
    `grouped_mm_experts_forward`.
    """
    tokens, each = chosen.shape
    order = chosen.reshape(-1).sort()[1]
    pairs = hidden[order // each]
    inner = experts.gate_up_proj if experts.has_gate else experts.up_proj
    out = _product(experts, pairs, inner)
    if experts.has_bias:
        bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        out = out + bias[chosen.reshape(-1)]
    out = experts._apply_gate(out) if experts.has_gate else experts.act_fn(out)
    out = _product(experts, out, experts.down_proj)
    if experts.has_bias:
        out = out + experts.down_proj_bias[chosen.reshape(-1)]
    weighted = (out * weights.reshape(-1)[order, None])[order]
    return weighted.view(tokens, each, -1).sum(1).to(hidden.dtype)


def _product(experts: Any, rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows times the matrix of the first expert, of `matrices` [E, out, in], or [E, in, out] where
    transposed.
    """
    first = matrices[0].to(rows.dtype)
    return rows @ (first if experts.is_transposed else first.t())
