"""The loss: the weighted sum of next-token cross-entropies over the targets of a pack.

    loss = sum_m w_m * (logsumexp(z_m) - z_m[label_m]),   z_m = transform(h_m W^T + b)

and, where `Loss` asks for it (eps = label_smoothing, c_m = p(label_m) held constant with dft, else
1, V rows of W):

loss = sum_m w_m * (c_m * (logsumexp(z_m) - (1 - eps) z_m[label_m] - eps mean(z_m)) + z_loss *
logsumexp(z_m)^2)

Only target positions meet the head, a chunk of rows at a time, so that memory depends neither on
the length of the pack times the vocabulary nor on the number of targets. Statistics are fp32, and
so is the accumulated gradient of W.

Beside it stands the weight of the targets that the model would choose itself: those whose label is
the argmax of z_m, the first of several equal logits. `Loss` does not change it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sftx.settings.schema import Loss

PLAIN = Loss()
"""The objective without additions: what evaluation reports."""
CHUNK_BYTES = 64 << 20
"""Budget of the logits held at once, in bytes of fp32; 16 times as much on a GPU, whose products
want more rows.
"""
Chunk = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Rows, all hidden states, matrix of the head -> loss of the rows, its gradient with respect to the
head's output.
"""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the head's output: `z = softcap * tanh(scale * x / softcap)`; softcap 0
    = none.
    """

    scale: float = 1.0
    softcap: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to logits of any shape."""
        if self.scale != 1.0:
            x = x * self.scale
        if self.softcap:
            x = self.softcap * torch.tanh(x / self.softcap)
        return x

    def backward(self, grad: Tensor, slope: Tensor | None) -> None:
        """Make the gradient of the result that of the head's output, in place."""
        if slope is not None:
            grad *= slope
        if self.scale != 1.0:
            grad *= self.scale


def cross_entropy_sum(
    logits: Tensor, label: Tensor, weight: Tensor, objective: Loss = PLAIN
) -> Tensor:
    """Weighted sum of losses from logits [M, V]; `label` int64[M], `weight` float32[M] -> scalar
    float32.
    """
    logits = logits.float()
    lse = torch.logsumexp(logits, dim=-1)
    mean = logits.mean(-1) if objective.label_smoothing else None
    losses, _ = _losses(_at(logits, label), mean, lse, objective)
    return (losses.double() * weight).sum().float()


def correct_weight(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """The weight of the rows of logits [M, V] whose argmax is their label, a scalar float64."""
    return _weight_where(logits.detach().argmax(-1) == label, weight)


def _weight_where(chosen: Tensor, weight: Tensor) -> Tensor:
    return (chosen * weight.double()).sum()


def _at(z: Tensor, label: Tensor) -> Tensor:
    return z.gather(-1, label[:, None])[:, 0]


def _losses(
    at_label: Tensor, mean: Tensor | None, lse: Tensor, objective: Loss
) -> tuple[Tensor, Tensor | None]:
    """Loss [M] of rows of logits, from each row's value at the label, mean (None where not needed)
    and log-sum-exp; and c [M] of the module's formula (None = 1).
    """
    nll = lse - at_label
    share = torch.exp(-nll.detach()) if objective.dft else None
    if mean is not None:
        eps = objective.label_smoothing
        nll = (1 - eps) * nll + eps * (lse - mean)
    if share is not None:
        nll = share * nll
    if objective.z_loss:
        nll = nll + objective.z_loss * lse**2
    return nll, share


def fused_cross_entropy_sum(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    label: Tensor,
    weight: Tensor,
    transform: LogitTransform,
    objective: Loss = PLAIN,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_sum` and `correct_weight` from hidden states [M, h] and the head's matrix
    [V, h], without ever holding [M, V].

    Gradients are computed chunk by chunk in the forward pass (6 h V operations per target in all,
    none twice). Under autocast the products run in its dtype, as the model's own head would; the
    sums stay in fp32.
    """
    device = hidden.device.type
    eps = objective.label_smoothing
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if not torch.is_grad_enabled():  # which an autograd function cannot see
        head = head.detach()
        bias = None if bias is None else bias.detach()
    correct = torch.zeros((), dtype=torch.float64, device=hidden.device)

    def chunk(s: slice, hidden: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (fp64 scalar) of some rows and its gradient with respect to the head's output, fp32
        [rows, V].

        One array of that size is enough: the logits become the gradient in place.
        """
        x = (hidden[s] @ matrix.t()).float()
        if bias is not None:
            x += bias
        z = transform(x)
        at_label = _at(z, label[s])
        mean = z.mean(-1) if eps else None
        slope = 1 - (z / transform.softcap) ** 2 if transform.softcap else None
        peak, best = z.max(-1)
        correct.add_(_weight_where(best == label[s], weight[s]))
        grad = z.sub_(peak[:, None]).exp_()
        mass = grad.sum(-1)
        lse = peak + mass.log()
        losses, share = _losses(at_label, mean, lse, objective)
        pull = weight[s] if share is None else weight[s] * share
        of_lse = pull
        if objective.z_loss:
            of_lse = pull + 2 * objective.z_loss * weight[s] * lse
        grad *= (of_lse / mass)[:, None]
        column = pull[:, None]
        grad.scatter_add_(-1, label[s, None], (eps - 1) * column)
        if eps:
            grad -= (eps / z.shape[1]) * column
        transform.backward(grad, slope)
        return (losses.double() * weight[s]).sum(), grad

    return _FusedCrossEntropy.apply(hidden, head, bias, chunk), correct


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, chunk: Chunk
    ) -> Tensor:
        needs_hidden, needs_head, needs_bias, _ = ctx.needs_input_grad
        vocabulary = head.shape[0]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        d_hidden = d_head = d_bias = None
        if needs_hidden:
            d_hidden = torch.empty_like(hidden)
        if needs_head:
            fill = torch.empty if len(hidden) else torch.zeros  # without targets no chunk writes it
            d_head = fill(head.shape, dtype=torch.float32, device=head.device)
        if needs_bias:
            d_bias = torch.zeros(vocabulary, dtype=torch.float32, device=head.device)
        budget = CHUNK_BYTES
        if hidden.device.type != "cpu":
            budget *= 16
        rows = max(1, budget // (4 * vocabulary))
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = head.detach().to(hidden.dtype)
            for a in range(0, hidden.shape[0], rows):
                s = slice(a, min(a + rows, hidden.shape[0]))
                loss, grad = chunk(s, hidden, matrix)
                total += loss
                if d_bias is not None:
                    d_bias += grad.sum(0)
                grad = grad.to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[s] = grad @ matrix
                if d_head is not None:
                    _add_outer(d_head, grad, hidden[s], first=a == 0)
        # Not `save_for_backward`: nobody else may hold them, so that autograd takes them over
        # without a copy.
        ctx.gradients = (d_hidden, d_head, d_bias)
        return total.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = ctx.gradients
        ctx.gradients = None
        # Autograd casts each to the dtype of its input.
        return *(None if d is None else d.mul_(grad) for d in gradients), None


def _add_outer(total: Tensor, grad: Tensor, hidden: Tensor, first: bool) -> None:
    """total += grad^T hidden, accumulated in fp32 whatever the dtype of `hidden`; `first` = total
    holds nothing yet.
    """
    if hidden.dtype == torch.float32:
        total.addmm_(grad.t(), hidden, beta=0 if first else 1)
    elif first:
        total.copy_(grad.t() @ hidden)
    else:
        total += grad.t() @ hidden
