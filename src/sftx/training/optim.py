"""AdamW, and the learning rate as a pure function of the step."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sftx.model.shard import local_shard
from sftx.settings.schema import Adapter, Optim

DEFAULT_LEARNING_RATE = {"none": 2e-5, "lora": 2e-4, "rslora": 2e-4, "dora": 2e-4}
_NO_MATRIX = re.compile(r"(norm|bias|trainable_tokens)[^.]*(\.\w+)?$")
"""How names end of what is no matrix, whatever its shape: norms of heads (Cohere), biases of
experts (GPT-OSS).
"""


def peak_learning_rate(optim: Optim, adapter: Adapter) -> float:
    """The learning rate that was set, or the default of the method."""
    if optim.learning_rate is None:
        return DEFAULT_LEARNING_RATE[adapter.method]
    return optim.learning_rate


def learning_rate(step: int, num_steps: int, optim: Optim, peak: float) -> float:
    """Learning rate of update `step` (0-based) out of `num_steps`.

    Linear warm-up reaches the peak after `warmup` updates; the schedule would end at `final_ratio *
    peak` right after the last update.
    """
    warmup = round(optim.warmup * num_steps) if optim.warmup < 1 else int(optim.warmup)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match optim.schedule:
        case "constant":
            return peak
        case "linear":
            factor = 1 - progress
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            factor = min(1.0, (num_steps - step) / max(1, round(optim.decay * num_steps)))
    return peak * (optim.final_ratio + (1 - optim.final_ratio) * factor)


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; weight decay on matrices, never on norms, biases
    or embeddings.
    """
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = (
                parameter.ndim >= 2
                and id(parameter) not in embeddings
                and not _NO_MATRIX.search(name)
            )
            (decayed if is_matrix else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if optim.weights == "fp32" else StochasticAdamW
    return with_moments(
        kind(
            [g for g in groups if g["params"]], lr=0.0, betas=optim.betas, eps=optim.eps, fused=True
        )
    )


def with_moments(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """The optimizer, its moments made: in its first step they would come among activations, and
    leave holes.
    """
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        means = {
            name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")
        }
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **means}
    return optimizer


class StochasticAdamW(torch.optim.AdamW):
    """AdamW on bf16 parameters that have no fp32 copy: computed in fp32, with fp32 means, then
    rounded at random.

    bf16 is the upper half of fp32, so adding 16 random bits and cutting the lower half rounds up
    with just the probability that leaves the expectation unchanged. The bits are a function of
    `seed`, which must differ in every step, and of the place of a weight in the model, whichever
    rank holds it. It needs `with_moments`.
    """

    seed = 0
    found_inf: torch.Tensor | None = (
        None  # 1 where the step must not be applied, as in PyTorch's fused kernel
    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update; no closure is taken."""
        first = self.seed * 0x9E3779B9  # number of the weight that comes next
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                first = first + p.numel()
                if p.grad is None:
                    continue
                settings = {
                    name: group[name]
                    for name in ("amsgrad", "lr", "weight_decay", "eps", "maximize")
                }
                settings |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
                shard, start = local_shard(p)
                weight = shard.float()
                grad = local_shard(p.grad)[0].float()
                means = [local_shard(state["exp_avg"])[0]], [local_shard(state["exp_avg_sq"])[0]]
                adamw(
                    [weight],
                    [grad],
                    *means,
                    [],
                    [state["step"]],
                    fused=True,
                    found_inf=self.found_inf,
                    **settings,
                )
                bits = random_bits(first - p.numel() + start, weight.numel(), p.device)
                raised = weight.view(torch.int32) + bits.view(weight.shape)
                cut = raised & -(1 << 16)
                shard.copy_(cut.view(torch.float32))


def random_bits(first: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of the numbers `first`, `first` + 1, ...: int32[count], the same on
    every device.

    An integer hash (Wellons' lowbias32): a generator would have to draw all that other ranks draw.
    """
    first_of_32_bits = (first + 2**31) % 2**32 - 2**31
    x = torch.arange(count, dtype=torch.int32, device=device)
    x = x + first_of_32_bits
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        lower = (1 << (32 - shift)) - 1  # without copies of the sign
        x = (x ^ ((x >> shift) & lower)) * factor
    return (x >> 16) & 0xFFFF
