"""Before the first step: ranks that share a pack compute the loss of one rank that has it alone."""

from __future__ import annotations

import torch

from sftx import distributed
from sftx.model.checks.start import evaluating
from sftx.model.context_parallel import Context
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.types import Pack, UserError


def check_context(loss: PackLoss, probe: Pack, context: Context, precision: torch.dtype) -> None:
    """UserError where the losses of `probe` differ. Every rank takes part, with the same `probe`."""
    device = next(loss.parameters()).device
    tolerance = 1e-4 if precision == torch.float32 else 5e-2
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    with evaluating(loss), torch.no_grad(), autocast:
        alone = float(loss(to_tensors(probe, device)))
        own = loss(to_tensors(probe, device, context)).double()
    groups = distributed.world_size() // context.size
    together = float(distributed.all_reduce_sum(own)) / groups
    if abs(together - alone) > tolerance * abs(alone):
        raise UserError(
            f"runtime.context_parallel: {context.size} processes that share a pack compute a loss "
            f"of {together:.6f}, one process {alone:.6f}: a layer of {type(loss.model).__name__} "
            "needs more of a text than its attention gives it; set runtime.context_parallel: 1"
        )
