"""One optimiser step. This is the whole of the mathematics; everything else decides what goes in."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sftx import distributed
from sftx.model.pack_loss import PackLoss, Tally, TensorPack
from sftx.model.routing import NUMBERS, router_numbers
from sftx.model.shard import full_tensor, keep_gathered


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of a step, still on the device, and the same numbers on their way to the host."""

    loss: Tensor  # weighted mean over the step's targets, float32 scalar
    accuracy: Tensor  # share of their weight whose argmax is right, float64 scalar
    grad_norm: Tensor  # before clipping
    bad: (
        Tensor  # 1.0 where loss or gradient was not finite and the update was therefore not applied
    )
    numbers: Tensor  # the four and those of routers, in the host's memory once `arrived`
    arrived: torch.cuda.Event | None  # None where the device is the host

    def read(self) -> tuple[float, float, float, bool]:
        """Loss, accuracy, gradient norm and bad; waits for this step, not for what was launched
        after it.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, accuracy, grad_norm, bad = cast(list[float], self.numbers[:4].tolist())
        return loss, accuracy, grad_norm, bool(bad)

    def routers(self) -> dict[str, float] | None:
        """What `model.routing` says of the routers, once `read`, without what is not known; None
        where there are none.
        """
        numbers = cast(list[float], self.numbers[4:].tolist())
        named = zip(NUMBERS, numbers, strict=False)
        return {name: number for name, number in named if not math.isnan(number)} or None


def train_step(
    model: PackLoss,
    optimizer: torch.optim.AdamW,
    packs: Sequence[TensorPack],
    total_weight: float,
    learning_rate: float,
    max_grad_norm: float,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> StepResult:
    """Gradient of sum(w * nll) / total_weight over all packs of all ranks, clipped, applied.

    `total_weight` is the weight of the whole step, known from the plan: however the step is cut
    into packs, each adds its share of one and the same sum. Every rank brings equally many packs.
    """
    loss = torch.zeros((), device=next(model.parameters()).device)
    tally = Tally(loss.device)
    model.routers.restart()
    # The outer context, itself switched off, keeps the weights that autocast has cast from one pack
    # to the next.
    with torch.autocast(loss.device.type, enabled=False):
        for number, pack in enumerate(packs, 1):
            _before_pack(model, number == len(packs))
            with autocast():
                pack_loss = model(pack, tally)
            (pack_loss / total_weight).backward()
            loss += pack_loss.detach() / total_weight
    keep_gathered(model, until_backward=False, until_next=False)
    routed = model.routers.sums(loss.device)
    own = [torch.stack([loss.double(), tally.correct]), routed.flatten()]
    sums = distributed.all_reduce_sum(torch.cat(own))
    loss = sums[0].float()
    accuracy = sums[1] / total_weight
    of_routers = router_numbers(sums[2:].reshape(routed.shape), model.routers.scores)

    parameters = [
        p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    gradients = [p.grad for p in parameters if p.grad is not None]
    grad_norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    if max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)

    # The fused kernel leaves every weight alone where `found_inf` is 1, without the host having to
    # look.
    bad = 1.0 - (torch.isfinite(loss) & torch.isfinite(grad_norm)).float()
    optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    numbers = torch.cat([torch.stack([loss, accuracy, grad_norm, bad]), of_routers])
    arrived = None
    if numbers.is_cuda:
        numbers = numbers.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    return StepResult(loss, accuracy, grad_norm, bad, numbers, arrived)


def _before_pack(model: PackLoss, last: bool) -> None:
    """Replicas exchange what they have summed once, with the `last` pack of a step; weights in
    shards are gathered once, where there is memory.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        keep_gathered(model, model.keeps_gathered, model.keeps_gathered and not last)
