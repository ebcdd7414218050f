"""AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.adamw import adamw

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
            factor = min(1.0, (num_steps - step) / max(1, round(optim.decay * num_steps)))
    return peak * (optim.final_ratio + (1 - optim.final_ratio) * factor if optim.schedule != "constant" else 1.0)


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; weight decay on matrices, never on norms, biases or embeddings."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings and "trainable_tokens" not in name
            (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    kind = torch.optim.AdamW if optim.weights == "fp32" else StochasticAdamW
    return kind([g for g in groups if g["params"]], lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


class StochasticAdamW(torch.optim.AdamW):
    """AdamW on bf16 parameters that have no fp32 copy: computed in fp32, with fp32 means, then rounded at random.

    bf16 is the upper half of fp32, so adding 16 random bits and cutting the lower half rounds up with just the
    probability that leaves the expectation unchanged. The bits are drawn from `seed`, which must differ in every step.
    """

    seed = 0
    found_inf: torch.Tensor | None = None  # 1 where the step must not be applied, as in PyTorch's fused kernel

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update; no closure is taken."""
        generator = torch.Generator(self.param_groups[0]["params"][0].device).manual_seed(self.seed)
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, weight = self.state[p], p.float()
                for name in ("exp_avg", "exp_avg_sq") if not state else ():
                    state[name] = torch.zeros_like(weight)
                step = state.setdefault("step", torch.zeros((), device=p.device))
                settings = {name: group[name] for name in ("amsgrad", "lr", "weight_decay", "eps", "maximize")}
                settings |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
                means = [state["exp_avg"]], [state["exp_avg_sq"]]
                adamw([weight], [p.grad.float()], *means, [], [step], fused=True, found_inf=self.found_inf, **settings)
                bits = torch.randint(1 << 16, weight.shape, generator=generator, dtype=torch.int32, device=p.device)
                p.copy_(((weight.view(torch.int32) + bits) & -(1 << 16)).view(torch.float32))
