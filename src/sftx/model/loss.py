"""The loss: the weighted sum of next-token cross-entropies over the targets of a pack.

    loss = sum_m w_m * (logsumexp(z_m) - z_m[label_m]),   z_m = transform(h_m W^T + b)

and, where `Loss` asks for it (eps = label_smoothing, c_m = p(label_m) held constant with dft, else 1, V rows of W):

    loss = sum_m w_m * (c_m * (logsumexp(z_m) - (1 - eps) z_m[label_m] - eps mean(z_m)) + z_loss * logsumexp(z_m)^2)

Only target positions meet the head, a chunk of rows at a time, so that memory depends neither on the length of the
pack times the vocabulary nor on the number of targets. Statistics are fp32, and so is the accumulated gradient of W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sftx.config import Loss

PLAIN = Loss()
"""The objective without additions: what evaluation reports."""
CHUNK_BYTES = 64 << 20
"""Budget of the logits held at once, in bytes of fp32; 16 times as much on a GPU, whose products want more rows."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the head's output: `z = softcap * tanh(scale * x / softcap)`; softcap 0 = none."""

    scale: float = 1.0
    softcap: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to logits of any shape."""
        x = x * self.scale if self.scale != 1.0 else x
        return self.softcap * torch.tanh(x / self.softcap) if self.softcap else x


def cross_entropy_sum(logits: Tensor, label: Tensor, weight: Tensor, objective: Loss = PLAIN) -> Tensor:
    """Weighted sum of losses from logits [M, V]; `label` int64[M], `weight` float32[M] -> scalar float32."""
    logits = logits.float()
    lse = torch.logsumexp(logits, dim=-1)
    return (_losses(logits, lse, label, objective)[0].double() * weight).sum().float()


def _losses(z: Tensor, lse: Tensor, label: Tensor, objective: Loss) -> tuple[Tensor, Tensor | None]:
    """Loss [M] of each row of logits `z` [M, V], and c [M] of the module's formula (None = 1)."""
    nll = lse - z.gather(-1, label[:, None])[:, 0]
    share = torch.exp(-nll.detach()) if objective.dft else None
    if eps := objective.label_smoothing:
        nll = (1 - eps) * nll + eps * (lse - z.mean(-1))
    if share is not None:
        nll = share * nll
    return nll + objective.z_loss * lse**2 if objective.z_loss else nll, share


def fused_cross_entropy_sum(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    label: Tensor,
    weight: Tensor,
    transform: LogitTransform,
    objective: Loss = PLAIN,
) -> Tensor:
    """The same from hidden states [M, h] and the head's matrix [V, h], without ever holding [M, V].

    Gradients are computed chunk by chunk in the forward pass (6 h V operations per target in all, none twice).
    Under autocast the products run in its dtype, as the model's own head would.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(dtype), head.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _FusedCrossEntropy.apply(hidden, head, bias, label, weight, transform, objective)  # pyright: ignore[reportReturnType]


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        label: Tensor,
        weight: Tensor,
        transform: LogitTransform,
        objective: Loss,
    ) -> Tensor:
        needs_hidden, needs_head, needs_bias, *_ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if needs_head else None
        d_bias = torch.zeros(head.shape[0], dtype=torch.float32, device=head.device) if needs_bias else None
        rows = max(1, CHUNK_BYTES * (1 if hidden.device.type == "cpu" else 16) // (4 * head.shape[0]))
        with torch.autocast(hidden.device.type, enabled=False):
            for a in range(0, hidden.shape[0], rows):
                s = slice(a, min(a + rows, hidden.shape[0]))
                loss, grad = _chunk(hidden[s], head, bias, label[s], weight[s], transform, objective)
                total += loss
                if d_hidden is not None:
                    d_hidden[s] = grad.to(head.dtype) @ head
                if d_head is not None:
                    _add_outer(d_head, grad, hidden[s])
                if d_bias is not None:
                    d_bias += grad.sum(0)
        ctx.save_for_backward(d_hidden, d_head, d_bias)
        ctx.dtypes = (head.dtype, None if bias is None else bias.dtype)
        return total.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, d_head, d_bias = ctx.saved_tensors
        head_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_head is None else d_head.mul_(grad).to(head_dtype),
            None if d_bias is None else (d_bias * grad).to(bias_dtype),
            None,
            None,
            None,
            None,
        )


def _chunk(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    label: Tensor,
    weight: Tensor,
    transform: LogitTransform,
    objective: Loss,
) -> tuple[Tensor, Tensor]:
    """Loss (fp64 scalar) of a few rows and its gradient with respect to the head's output, fp32 [rows, V]."""
    x = (hidden @ head.t()).float()
    if bias is not None:
        x += bias
    z = transform(x)
    lse = torch.logsumexp(z, dim=-1)
    losses, share = _losses(z, lse, label, objective)
    eps, pull = objective.label_smoothing, weight if share is None else weight * share
    grad = torch.exp(z - lse[:, None])
    grad *= (pull + 2 * objective.z_loss * weight * lse if objective.z_loss else pull)[:, None]
    grad.scatter_add_(-1, label[:, None], (eps - 1) * pull[:, None])
    if eps:
        grad -= (eps / z.shape[1]) * pull[:, None]
    if transform.softcap:
        grad *= 1 - (z / transform.softcap) ** 2
    if transform.scale != 1.0:
        grad *= transform.scale
    return (losses.double() * weight).sum(), grad


def _add_outer(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total += grad^T hidden, accumulated in fp32 whatever the dtype of `hidden`."""
    if hidden.dtype == torch.float32:
        total.addmm_(grad.t(), hidden)
    else:
        total += grad.to(hidden.dtype).t() @ hidden
