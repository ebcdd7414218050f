"""Mamba's selective scan where its kernels are not installed, in time linear in the tokens.

transformers' own scan takes a slice of a tensor [n, I, T, N] for every token, and the gradient of
each slice is a tensor of that whole size: its backward pass takes time in T^2, and everything is
kept for it. Here the states are computed again going backward, as the kernels do
(arXiv:2312.00752, section 3.3.2), and a token costs one operation.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,   y_t = h_t C_t + D u_t,   out_t = y_t silu(z_t)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """`hidden_states`, `dt`, `z` [n, I, T]; `A` [I, N]; `B`, `C` [n, N, T]; `D`, `delta_bias` [I] ->
    [n, I, T], and the last state [n, I, N] where asked for.
    """
    dtype = hidden_states.dtype
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    if delta_softplus:
        dt = nn.functional.softplus(dt)
    exact = torch.promote_types(A.dtype, dt.dtype)  # float32 at least: that of A

    def tokens_first(x: Tensor) -> Tensor:
        return x.to(exact).movedim(-1, 0).contiguous()

    u = tokens_first(hidden_states)
    step = tokens_first(dt)
    b = tokens_first(B)
    c = tokens_first(C)
    found, last = _Scan.apply(u, step, A.to(exact), b, c)
    out = found.movedim(0, -1).to(dtype)
    if D is not None:
        out = out + hidden_states * D[:, None]
    if z is not None:
        out = out * nn.functional.silu(z)
    if return_last_state:
        return out, last
    return out


def _states(u: Tensor, step: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The decays and the states of all tokens, [T, n, I, N] each."""
    decay = torch.exp(step[..., None] * A)
    states = (step * u)[..., None] * b[:, :, None, :]
    for t in range(1, len(states)):
        states[t].addcmul_(decay[t], states[t - 1])
    return decay, states


class _Scan(torch.autograd.Function):
    """`u`, `step` [T, n, I], `A` [I, N], `b`, `c` [T, n, N] -> y [T, n, I], last state [n, I, N]."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, step: Tensor, A: Tensor, b: Tensor, c: Tensor) -> Any:
        with torch.autocast(u.device.type, enabled=False):
            _, states = _states(u, step, A, b)
            out = states @ c[..., None]
        ctx.save_for_backward(u, step, A, b, c)
        last = states[-1].clone()
        ctx.mark_non_differentiable(last)
        return out[..., 0], last

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, step, A, b, c = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            decay, states = _states(u, step, A, b)
            d_c = grad[..., None, :] @ states
            pull = grad[..., None] * c[:, :, None, :]  # the gradient of every state
            for t in reversed(range(len(pull) - 1)):
                pull[t].addcmul_(decay[t + 1], pull[t + 1])
            inputs = step * u
            d_b = inputs[..., None, :] @ pull
            d_inputs = pull @ b[..., None]
            d_inputs = d_inputs[..., 0]
            d_power = pull[1:] * states[:-1] * decay[1:]  # of step * A; the first state has none
            d_step = d_inputs * u
            d_step[1:] += (d_power * A).sum(-1)
            d_a = d_power * step[1:, ..., None]
            d_a = d_a.sum((0, 1))
            d_u = d_inputs * step
        return d_u, d_step, d_a, d_b[..., 0, :], d_c[..., 0, :]
