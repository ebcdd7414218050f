"""How large a pack may be and how many layers are checkpointed, chosen by the predicted and the
available memory.
"""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import copy
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sftx import distributed
from sftx.boundary import boundary
from sftx.data.pack import PADDING, blank_pack
from sftx.data.plan import Plan
from sftx.data.shared_packs import LARGER, SIZES, Saving
from sftx.evenly import evenly
from sftx.model.architecture import auto_class
from sftx.model.context_parallel import Context
from sftx.model.flops import flops, reached_speed
from sftx.model.memory import Memory, MemoryEstimator
from sftx.model.pack_loss import PackLoss
from sftx.model.trainable import choose_weights
from sftx.settings.schema import Config, Runtime
from sftx.types import Int32, Pack, UserError

GPU_SIZES = [16384, 8192]
CPU_SIZES = [1024, 512]
COMPILED_CPU_SIZES = [2048, 1024, 512]
"""Tokens of a pack at which the device is about as fast as it gets, the largest first. Compiled
layers keep half as much of every token.
"""
MARGIN = 0.92
"""Share of the available memory that a prediction may take: allocators cannot use the rest to the
last byte.
"""


@dataclass(frozen=True, slots=True)
class StepProfile:
    """What the data asks of a step, apart from the model: see `of_plan`."""

    longest: int  # tokens of the longest example
    step_tokens: int  # tokens of the largest step, on the process that has most of them
    target_share: float  # targets per token
    tokens: float = 0.0  # of all steps
    squares: float = 0.0  # of the lengths of all examples of all steps
    shared_pack: int = 0  # tokens of a pack that shared prefixes are worth

    def sharing(self, saving: Saving) -> StepProfile:
        """What is asked where shared prefixes are computed once."""
        rest = 1 - saving.share
        return replace(
            self,
            target_share=min(self.target_share / rest, 1.0),
            tokens=self.tokens * rest,
            squares=self.squares * (1 - saving.saved_squares / max(saving.squares, 1.0)),
            shared_pack=saving.pack_size,
        )

    @classmethod
    def of_plan(cls, plan: Plan, targets: int, world_size: int = 1) -> StepProfile:
        """The load of `plan`, its largest step sought among (at most 2,000) steps; `targets` =
        those of one epoch.
        """
        steps = evenly(plan.num_steps, 2000)
        largest = max(
            steps, key=lambda step: int(plan.lengths[plan.examples(step)].sum()), default=None
        )
        # Ranks have equal work, not equal tokens: the one with the most of them decides.
        ranks = [] if largest is None else plan.packs(largest, 1 << 60, world_size)
        loads = [int(plan.lengths[list(members)].sum()) for (members,) in ranks]
        most = max(loads, default=1)
        epochs = plan.epoch(plan.num_steps - 1) if plan.num_steps else 0.0
        tokens, squares = (
            epochs * float((plan.lengths**power * plan.shares).sum()) for power in (1, 2)
        )
        return cls(
            int(plan.lengths.max()), most, targets / int(plan.lengths.sum()), tokens, squares
        )


@dataclass(frozen=True, slots=True)
class Packing:
    """The choice, and what it is predicted to take; `memory` is None where it could not be
    predicted.
    """

    tokens_per_pack: int
    recomputed: int
    memory: Memory | None
    available: int  # bytes
    notes: tuple[str, ...] = ()
    gathered: bool = False  # whether weights in shards are gathered once a step
    shares_prefixes: bool = False  # whether packs compute them once
    context: Context | None = None  # the ranks that compute each pack together with this one

    def of_all_ranks(self) -> dict[str, object]:
        """What every rank must have chosen alike, in words."""
        return {
            "tokens per pack": self.tokens_per_pack,
            "shared prefixes": self.shares_prefixes,
            "weights gathered once a step": self.gathered,
        }

    def parts(self) -> dict[str, int]:
        """Bytes by what holds them, and their sum at the peak; {} where they could not be
        predicted.
        """
        if self.memory is None:
            return {}
        return {**asdict(self.memory), "peak": self.memory.peak}


def meta_model(
    config: Config, model_config: PreTrainedConfig, added_token_ids: dict[int, bool]
) -> PackLoss:
    """The model as it will train, adapter and frozen weights included, on the meta device: shapes
    without contents.

    `added_token_ids` = the tokens that the run adds, see `Tokenizer`.
    """
    dtype = torch.float32 if config.optim.weights == "fp32" else torch.bfloat16
    with torch.device("meta"):
        with boundary(f"model.path: {config.model.path} cannot be built from its config.json"):
            model = auto_class(model_config).from_config(
                copy.deepcopy(model_config),
                dtype=dtype,
                trust_remote_code=config.model.trust_remote_code,
            )
        assert isinstance(model, PreTrainedModel)
        choose_weights(model, config.model, config.adapter, config.seed, added_token_ids)
    return PackLoss(model, config.loss).train()


def set_example_cost(plan: Plan, loss: PackLoss, targets: Int32) -> None:
    """Tell the plan what each example costs to compute; `targets` int32[N] = how many targets each
    has.
    """
    lengths = plan.lengths.astype(np.float64)
    plan.cost = partial(flops, loss)
    plan.work = plan.cost(lengths, targets.astype(np.float64), lengths**2)


def largest_pack(runtime: Runtime, device: torch.device, load: StepProfile) -> int:
    """The most tokens that a process may get at once, whatever is chosen."""
    sizes = GPU_SIZES if device.type == "cuda" else COMPILED_CPU_SIZES
    sizes = _with_larger(sizes, load)
    return max(load.longest, min(load.step_tokens, runtime.tokens_per_pack or max(sizes)))


def choose_packing(
    runtime: Runtime,
    estimator: MemoryEstimator,
    load: StepProfile,
    available: int,
    earlier: int | None = None,
) -> Packing:
    """The largest packs, then the fewest recomputed layers, that fit into `available` bytes;
    UserError where none do.

    Packs shrink down to the size below which a device gets slower; only then layers are recomputed;
    and where all of them are not enough, packs shrink further. What the settings say is taken as it
    is. A run that is continued keeps the `earlier` size, so that it goes on to the bit whatever
    else the machine does now.
    """
    if earlier is not None and runtime.tokens_per_pack is None:
        try:
            return choose_packing(
                runtime.model_copy(update={"tokens_per_pack": earlier}), estimator, load, available
            )
        except UserError:
            found = choose_packing(runtime, estimator, load, available)
            note = (
                f"the run had packs of {earlier:,} tokens, which no longer fit: from here on "
                "it differs by rounding (and what dropout drops is another draw)"
            )
            return replace(found, notes=(*found.notes, note))
    fitting = MARGIN * available
    found: Packing | None = None
    for size, recomputed in _candidates(runtime, estimator, load):
        try:
            memory = predict(estimator, load, size, recomputed)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            return Packing(
                size, recomputed, None, available, (f"memory could not be predicted: {reason}",)
            )
        found = Packing(size, recomputed, memory, available)
        if memory.peak <= fitting:
            counts = range(recomputed + 1) if runtime.recompute == "auto" else [recomputed]
            first = bisect_left(
                counts, x=True, key=lambda n: predict(estimator, load, size, n).peak <= fitting
            )
            memory = predict(estimator, load, size, counts[first])
            return _gathered(Packing(size, counts[first], memory, available), estimator, load)
    assert found is not None
    assert found.memory is not None
    raise UserError(_refusal(found, found.memory, load))


def _gathered(chosen: Packing, estimator: MemoryEstimator, load: StepProfile) -> Packing:
    """The choice with weights that are gathered once a step, where they are in shards and fit."""
    if (estimator.shards or 1) == 1:
        return chosen
    size, count = chosen.tokens_per_pack, chosen.recomputed
    memory = predict(estimator, load, size, count, gathered=True)
    if memory.peak > MARGIN * chosen.available:
        return chosen
    note = "weights in shards are gathered once a step: there is memory to keep them until its end"
    return replace(chosen, memory=memory, gathered=True, notes=(*chosen.notes, note))


def seconds_of(
    estimator: MemoryEstimator,
    load: StepProfile,
    chosen: Packing,
    tokens: int,
    padding: float = 0.0,
) -> float | None:
    """Predicted seconds of all steps, from a layer timed here, on a GPU over a whole pack,
    elsewhere over at most `tokens` tokens; None where none can be. `padding`: the share of what is
    computed that is padding.
    """
    if not load.tokens:
        return 0.0
    work = flops(
        estimator.loss,
        load.tokens,
        load.target_share * load.tokens,
        load.squares,
        chosen.recomputed,
    )
    of_one = chosen.tokens_per_pack // estimator.context_size
    tokens = of_one if estimator.on_gpu else min(of_one, tokens)
    length = round(load.squares / load.tokens)
    if estimator.loss.paths.padded:  # a few rows, all of one length
        tokens = min(max(tokens // length, 4), max(chosen.tokens_per_pack // length, 1)) * length
    pack = blank_pack(tokens, length, 1.0)
    try:
        speed = reached_speed(estimator, pack)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # as in `fit`
        return None
    if speed:
        return work / (1 - padding) / (speed * distributed.world_size())
    return None


def predict(
    estimator: MemoryEstimator,
    load: StepProfile,
    tokens_per_pack: int,
    recomputed: int,
    gathered: bool = False,
) -> Memory:
    """Memory with packs of that size: those of a step are about equally full, and an example is
    never cut.
    """
    count = -(-load.step_tokens // tokens_per_pack)
    if estimator.loss.paths.padded:
        pack = _largest_batch(load, tokens_per_pack)
        count = load.step_tokens // load.longest
    else:
        tokens = max(-(-load.step_tokens // count), load.longest)
        pack = blank_pack(tokens, load.longest, load.target_share)
    return estimator.predict(pack, recomputed, count > 1, gathered)


def _largest_batch(load: StepProfile, tokens_per_pack: int) -> Pack:
    """A right-padded batch as large as one can get: rows of one length."""
    tokens = min(tokens_per_pack, round(load.step_tokens / (1 - PADDING)))
    rows = max(-(-tokens // load.longest), 1)
    length = load.longest if rows == 1 else tokens // rows
    return blank_pack(rows * length, length, load.target_share)


def _with_larger(sizes: list[int], load: StepProfile) -> list[int]:
    """The sizes, and before them the larger ones that shared prefixes are worth."""
    usual = sizes[0]
    most = min(load.shared_pack, LARGER * usual)
    larger = [size for size in reversed(SIZES) if usual < size <= most]
    return larger + sizes


def _candidates(
    runtime: Runtime, estimator: MemoryEstimator, load: StepProfile
) -> list[tuple[int, int]]:
    """(tokens per pack, checkpointed layers), in the order of preference."""
    layers = len(estimator.layers)
    good, small = _sizes(runtime, estimator, load)
    match runtime.recompute:
        case "auto":
            whole = [(size, 0) for size in good]
            return whole + [(size, layers) for size in (good[-1], *small)]
        case "all":
            count = max(layers, 1)  # a model whose layers are not found is refused, not passed over
        case "none":
            count = 0
        case number:
            count = number
    return [(size, count) for size in (*good, *small)]


def _sizes(
    runtime: Runtime, estimator: MemoryEstimator, load: StepProfile
) -> tuple[list[int], list[int]]:
    """Tokens of a pack at which the device is fast, and those at which it gets slower."""
    if runtime.tokens_per_pack is not None:
        return [runtime.tokens_per_pack], []
    good = COMPILED_CPU_SIZES if estimator.compiled else CPU_SIZES
    if estimator.on_gpu:
        good = GPU_SIZES
    good = _with_larger(good, load)
    small = [size for size in (4096, 2048, 1024, 512, 256) if size < good[-1]]
    # Of each process that computes a part of the pack.
    share = estimator.context_size
    return [share * size for size in good], [share * size for size in small]


def _refusal(tried: Packing, memory: Memory, load: StepProfile) -> str:
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in asdict(memory).items() if size)
    return (
        f"memory: a step is predicted to need {memory.peak / 2**30:.2f} GiB ({parts}), and "
        f"{tried.available / 2**30:.2f} "
        f"GiB are available, {100 * MARGIN:.0f} % of them to plan with. That was with packs of "
        f"{tried.tokens_per_pack:,} "
        f"tokens, a longest example of {load.longest:,} and {tried.recomputed} layers recomputed. "
        "Train an adapter "
        "(adapter: lora), shorten data.max_length, leave runtime.tokens_per_pack and "
        "runtime.recompute to sftx, or use "
        "a device with more memory, or several"
    )
