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
from sftx.model.accumulate import accumulates

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
    lse, mean = torch.logsumexp(logits, dim=-1), logits.mean(-1) if objective.label_smoothing else None
    return (_losses(_at(logits, label), mean, lse, objective)[0].double() * weight).sum().float()


def _at(z: Tensor, label: Tensor) -> Tensor:
    return z.gather(-1, label[:, None])[:, 0]


def _losses(at_label: Tensor, mean: Tensor | None, lse: Tensor, objective: Loss) -> tuple[Tensor, Tensor | None]:
    """Loss [M] of rows of logits, from each row's value at the label, mean (None where not needed) and log-sum-exp;
    and c [M] of the module's formula (None = 1)."""
    nll = lse - at_label
    share = torch.exp(-nll.detach()) if objective.dft else None
    if mean is not None:
        nll = (1 - objective.label_smoothing) * nll + objective.label_smoothing * (lse - mean)
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
    Under autocast the products run in its dtype, as the model's own head would; the sums stay in fp32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
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
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        fill = torch.empty if len(hidden) else torch.zeros  # without targets no chunk writes it
        d_head = fill(head.shape, dtype=torch.float32, device=head.device) if needs_head else None
        d_bias = torch.zeros(head.shape[0], dtype=torch.float32, device=head.device) if needs_bias else None
        ctx.dtypes = (head.dtype, None if bias is None else bias.dtype)
        rows = max(1, CHUNK_BYTES * (1 if hidden.device.type == "cpu" else 16) // (4 * head.shape[0]))
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = head.detach().to(hidden.dtype)
            for a in range(0, hidden.shape[0], rows):
                s = slice(a, min(a + rows, hidden.shape[0]))
                loss, grad = _chunk(hidden[s], matrix, bias, label[s], weight[s], transform, objective)
                total += loss
                if d_bias is not None:
                    d_bias += grad.sum(0)
                grad = grad.to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[s] = grad @ matrix
                if d_head is not None:
                    _add_outer(d_head, grad, hidden[s], first=a == 0)
        # Not `save_for_backward`: nobody else may hold them, so that autograd takes them over without a copy.
        ctx.gradients, ctx.head = (d_hidden, d_head, d_bias), head
        return total.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, d_head, d_bias = ctx.gradients
        ctx.gradients = None
        head_dtype, bias_dtype = ctx.dtypes
        if d_head is not None and accumulates(ctx.head):
            if ctx.head.grad is None:  # an embedding that shares the weight then adds its few rows to it
                ctx.head.grad = d_head.mul_(grad)
            else:
                ctx.head.grad.addcmul_(d_head, grad)
            d_head = None
        return (
            None if d_hidden is None else d_hidden.mul_(grad),
            None if d_head is None else d_head.mul_(grad).to(head_dtype),
            None if d_bias is None else d_bias.mul_(grad).to(bias_dtype),
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
    """Loss (fp64 scalar) of a few rows and its gradient with respect to the head's output, fp32 [rows, V].

    One array of that size is enough: the logits become the gradient in place.
    """
    x = (hidden @ head.t()).float()
    if bias is not None:
        x += bias
    z = transform(x)
    eps = objective.label_smoothing
    at_label, mean = _at(z, label), z.mean(-1) if eps else None
    slope = 1 - (z / transform.softcap) ** 2 if transform.softcap else None
    peak = z.amax(-1)
    grad = z.sub_(peak[:, None]).exp_()
    mass = grad.sum(-1)
    lse = peak + mass.log()
    losses, share = _losses(at_label, mean, lse, objective)
    pull = weight if share is None else weight * share
    grad *= ((pull + 2 * objective.z_loss * weight * lse if objective.z_loss else pull) / mass)[:, None]
    grad.scatter_add_(-1, label[:, None], (eps - 1) * pull[:, None])
    if eps:
        grad -= (eps / z.shape[1]) * pull[:, None]
    if slope is not None:
        grad *= slope
    if transform.scale != 1.0:
        grad *= transform.scale
    return (losses.double() * weight).sum(), grad


def _add_outer(total: Tensor, grad: Tensor, hidden: Tensor, first: bool) -> None:
    """total += grad^T hidden, accumulated in fp32 whatever the dtype of `hidden`; `first` = total holds nothing yet."""
    if hidden.dtype == torch.float32:
        total.addmm_(grad.t(), hidden, beta=0 if first else 1)
    elif first:
        total.copy_(grad.t() @ hidden)
    else:
        total += grad.t() @ hidden
