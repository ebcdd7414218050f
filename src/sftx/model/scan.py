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
    inputs = (hidden_states, dt, B, C)
    u, step, b, c = (x.to(exact).movedim(-1, 0).contiguous() for x in inputs)
    found, last = _Scan.apply(u, step, A.to(exact), b, c)
    out = found.movedim(0, -1).to(dtype)
    if D is not None:
        out = out + hidden_states * D[:, None]
    if z is not None:
        out = out * nn.functional.silu(z)
    return (out, last) if return_last_state else out


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
            out = (states @ c[..., None])[..., 0]
        ctx.save_for_backward(u, step, A, b, c)
        last = states[-1].clone()
        ctx.mark_non_differentiable(last)
        return out, last

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, step, A, b, c = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            decay, states = _states(u, step, A, b)
            d_c = (grad[..., None, :] @ states)[..., 0, :]
            pull = grad[..., None] * c[:, :, None, :]  # the gradient of every state
            for t in range(len(pull) - 2, -1, -1):
                pull[t].addcmul_(decay[t + 1], pull[t + 1])
            d_b = ((step * u)[..., None, :] @ pull)[..., 0, :]
            d_input = (pull @ b[..., None])[..., 0]  # of step * u
            d_power = pull[1:] * states[:-1] * decay[1:]  # of step * A; the first state has none
            d_step = d_input * u
            d_step[1:] += (d_power * A).sum(-1)
            d_a = (d_power * step[1:, ..., None]).sum((0, 1))
        return d_input * step, d_step, d_a, d_b, d_c
