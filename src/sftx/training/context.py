"""How many ranks compute a pack together: what the settings say, or as few as a step fits into."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedConfig

from sftx import distributed
from sftx.model.context_parallel import Context, check_heads
from sftx.model.memory import MemoryEstimator
from sftx.model.pack_loss import PackLoss
from sftx.settings.schema import Config, Runtime
from sftx.training.memory_plan import StepProfile, choose_packing
from sftx.types import UserError

ProfileOf = Callable[[int], StepProfile]
"""The load of a step by how many groups of ranks share its packs."""


def check_context_size(config: Config, model_config: PreTrainedConfig, ranks: int) -> None:
    """UserError where `runtime.context_parallel` cannot be had."""
    size = config.runtime.context_parallel
    if size in ("auto", 1):
        return
    if ranks % size:
        raise UserError(
            f"runtime.context_parallel: {size} processes compute a pack together, but the run has "
            f"{ranks}, which is no multiple of it"
        )
    check_heads(model_config, size)
    if config.loss.router_aux:
        raise UserError(
            "loss.router_aux: the balance of experts counts whole examples, which no process has "
            f"with runtime.context_parallel: {size}; leave one of them out"
        )


def context_sizes(config: Config, model_config: PreTrainedConfig, ranks: int) -> list[int]:
    """The sizes to try, the smallest first: those that the heads and the ranks allow, or the one
    that is set.
    """
    wish = config.runtime.context_parallel
    if wish != "auto":
        return [wish]
    if config.loss.router_aux:
        return [1]
    heads = getattr(model_config.get_text_config(), "num_attention_heads", 1)
    return [size for size in range(1, ranks + 1) if ranks % size == 0 and heads % size == 0]


def choose_context(
    runtime: Runtime,
    sizes: list[int],
    ranks: int,
    estimator: MemoryEstimator,
    profile_of: ProfileOf,
    available: int,
) -> StepProfile:
    """The load of a step with the smallest of `sizes` with which it fits into `available` bytes;
    with the first where none does. The estimator gets that size.
    """
    for size in sizes:
        estimator.context = _of_size(size)
        profile = profile_of(ranks // size)
        if len(sizes) == 1 or _fits(runtime, estimator, profile, available):
            return profile
    estimator.context = _of_size(sizes[0])
    return profile_of(ranks // sizes[0])


def choose_size(
    config: Config,
    loss: PackLoss,
    estimator: MemoryEstimator,
    profile_of: ProfileOf,
    available: int,
    earlier: int | None,
) -> tuple[int, StepProfile]:
    """How many ranks compute a pack together, and what a step then asks of them.

    A run that is continued keeps the `earlier` number where it can, so that it goes on to the bit.
    Raises UserError where the model cannot be computed so.
    """
    ranks = distributed.world_size()
    sizes = context_sizes(config, loss.model.config, ranks)
    if sizes[0] > 1 and not loss.paths.isolate:
        raise UserError(
            f"runtime.context_parallel: {type(loss.model).__name__} runs one example at a time, "
            "by its own attention, which one process must compute whole; set it to 1"
        )
    if len(sizes) > 1 and not (estimator.on_gpu and loss.paths.isolate):
        sizes = [1]
    if earlier in sizes:
        sizes = [earlier]
    profile = choose_context(config.runtime, sizes, ranks, estimator, profile_of, available)
    return estimator.context_size, profile


def join_context(size: int, timeout: float) -> Context | None:
    """The ranks that compute packs together with this one; None where none do."""
    if size == 1:
        return None
    group = distributed.group_of(size, timeout)
    return Context(size, distributed.rank() % size, group.group_name)


def _of_size(size: int) -> Context | None:
    """A context for predictions: that of the rank with the last tokens, which has most targets."""
    if size == 1:
        return None
    return Context(size, size - 1, "")


def _fits(
    runtime: Runtime, estimator: MemoryEstimator, profile: StepProfile, available: int
) -> bool:
    try:
        choose_packing(runtime, estimator, profile, available)
    except UserError:
        return False
    return True
