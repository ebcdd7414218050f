"""The settings of a first run: by goal, data and machine, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

import torch

from sftx.data.dataset import load_corpora
from sftx.data.encoder import DEFAULT_LENGTH
from sftx.data.plan import plan_of
from sftx.model.adapter import cast_frozen_weights, trainable
from sftx.model.folder import load_config
from sftx.model.memory import MemoryEstimator
from sftx.model.runtime import Machine, machine
from sftx.model.threads import choose_threads
from sftx.settings.make import make_config
from sftx.settings.schema import Config
from sftx.starter.look import Seen
from sftx.training.memory_plan import (
    Packing,
    StepProfile,
    choose_packing,
    meta_model,
    seconds_of,
    set_example_cost,
)
from sftx.types import UserError

Goal = Literal["instruct", "domain", "style", "reasoning"]
GOALS: dict[Goal, str] = {
    "instruct": "answer and follow instructions, from dialogues",
    "domain": "learn the language and facts of a field, mostly from plain text",
    "style": "take on a voice or a format, from few examples",
    "reasoning": "think before answering, from dialogues with thoughts",
}
EPOCHS: dict[Goal, int] = {"instruct": 2, "domain": 1, "style": 3, "reasoning": 2}
RANKS: dict[Goal, int] = {"instruct": 16, "domain": 64, "style": 8, "reasoning": 32}
LEAST_STEPS = 100
"""Updates that a run should have, where there are rows enough."""
ADAPTER_REASONS: dict[Goal, str] = {
    "instruct": "learns instructions as well as all weights, and forgets less",
    "domain": "all weights do not fit into the memory",
    "style": "changes the voice and leaves the rest of the model as it is",
    "reasoning": "all weights do not fit into the memory",
}
CALIBRATION = 256
"""Tokens of the layer that is timed."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A dotted setting, its value, and why it is so."""

    key: str
    value: object
    reason: str


@dataclass(slots=True)
class Choice:
    """The settings in their order, and what is predicted of the run."""

    settings: list[Setting] = field(default_factory=list[Setting])
    parameters: int = 0
    steps: int = 0
    seconds: float | None = None
    memory: str = ""  # in words

    def add(self, key: str, value: object, reason: str) -> None:
        """One more setting."""
        self.settings.append(Setting(key, value, reason))


@dataclass(frozen=True, slots=True)
class _Method:
    """A way to train that fits this machine."""

    config: Config
    packing: Packing
    seconds: float | None
    steps: int
    weights: tuple[int, int]  # trainable, all


def choose(seen: Seen, goal: Goal, output: str) -> Choice:
    """Settings with which the run starts and fits this machine.

    Raises:
        UserError: no method fits into the memory; the message has the figures.
    """
    choice = Choice()
    model = seen.config.model.path
    data = seen.config.data.train
    choice.add("model", model, f"{seen.positions:,} positions")
    rows = seen.corpus.ledger.trained + seen.corpus.ledger.split
    choice.add("data.train", data, f"{rows:,} rows ({seen.form})")
    for name, (value, reason) in seen.needed.items():
        choice.add(f"data.{name}", value, reason)
    _lengths(choice, seen)
    held_out = _held_out(choice, rows)
    choice.add("output", output, "the trained model and the record of the run")
    _batch(choice, seen, goal, rows - round(held_out * rows))
    with machine(seen.config.runtime) as here:
        choose_threads(seen.config.runtime, here.device, None)
        method = _fitting(choice, seen, goal, here)
    choice.parameters = method.weights[1]
    choice.steps = method.steps
    choice.seconds = method.seconds
    choice.memory = _needs(method.packing)
    _method(choice, goal, method)
    if held_out and method.steps >= 20:
        every = max(1, method.steps // 10)
        choice.add("eval.every", every, f"ten times in {method.steps:,} steps")
    size = 12 * method.weights[0]
    choice.add("checkpoint.minutes", 15, f"saves by time; a checkpoint takes about {_size(size)}")
    choice.add("checkpoint.keep", 2, "the newest ones, and the best")
    half = here.precision == torch.bfloat16
    reason = "computes in bfloat16 over float32 weights" if half else "a CPU computes in float32"
    choice.add("runtime.precision", "bf16" if half else "fp32", reason)
    choice.add("seed", 0, "the same command gives the same model")
    return choice


def _lengths(choice: Choice, seen: Seen) -> None:
    most = min(seen.positions, DEFAULT_LENGTH)
    ledger = seen.corpus.ledger
    length = min(-(-seen.longest // 64) * 64, most)
    reason = f"the longest example has {seen.longest:,} tokens"
    if ledger.split or ledger.truncated:
        reason = f"{ledger.split:,} rows are longer and are split"
    choice.add("data.max_length", max(length, 2), reason)


def _held_out(choice: Choice, rows: int) -> float:
    """The share of rows that is held out."""
    if rows < 20:
        return 0.0  # each of them is needed
    share = 0.1 if rows < 1000 else 0.05 if rows < 10_000 else round(500 / rows, 6)
    choice.add("data.eval_split", share, f"about {max(round(share * rows), 1):,} rows are held out")
    return share


def _batch(choice: Choice, seen: Seen, goal: Goal, rows: int) -> None:
    epochs = EPOCHS[goal]
    if seen.form == "text":
        tokens = int(seen.corpus.lengths.sum()) * epochs
        size = max(2048, min(65_536, tokens // LEAST_STEPS // 256 * 256))
        choice.add("batch.tokens_per_step", size, "texts are unequally long: count their tokens")
    else:
        sizes = (64, 32, 16, 8)
        fitting = (size for size in sizes if rows * epochs // size >= LEAST_STEPS)
        size = next(fitting, 4)
        choice.add("batch.examples_per_step", size, f"{rows * epochs // size:,} updates or more")
    passes = {1: "each row once", 2: "each row twice", 3: "few rows, shown three times"}
    choice.add("batch.epochs", epochs, passes[epochs])


def _fitting(choice: Choice, seen: Seen, goal: Goal, here: Machine) -> _Method:
    """The first way to train that fits into the memory."""
    lora = {"method": "lora", "rank": RANKS[goal], "alpha": 2.0 * RANKS[goal]}
    ways: list[dict[str, object]] = [{"method": "none"}, lora]
    if goal in ("instruct", "style"):
        ways = [lora]
    if here.device.type == "cuda" and find_spec("bitsandbytes"):
        ways.append({**lora, "quantize": "nf4"})
    refused: UserError | None = None
    for way in ways:
        try:
            return _tried(choice, seen, way, here)
        except UserError as error:
            refused = error
    assert refused is not None
    raise refused


def _tried(choice: Choice, seen: Seen, way: dict[str, object], here: Machine) -> _Method:
    """Steps, memory and time of the run with this adapter; UserError where it does not fit."""
    sections = as_sections([*choice.settings, Setting("adapter", way, "")])
    config = make_config(**sections)  # pyright: ignore[reportArgumentType]
    # What the run will read from the cache.
    corpus, _ = load_corpora(config, seen.tokenizer, config.data.max_length or DEFAULT_LENGTH)
    loss = meta_model(config, load_config(config.model), {})
    plan = plan_of(corpus, config)
    set_example_cost(plan, loss, corpus.targets)
    profile = StepProfile.of_plan(plan, int(corpus.targets.sum()))
    available, reserved = here.available_memory()
    cast_frozen_weights(loss.model, here.precision)
    nf4 = config.adapter.quantize == "nf4"
    estimator = MemoryEstimator(loss, here, reserved, None, nf4)
    packing = choose_packing(config.runtime, estimator, profile, available)
    seconds = seconds_of(estimator, profile, packing, CALIBRATION)
    return _Method(config, packing, seconds, plan.num_steps, trainable(loss))


def as_sections(settings: Sequence[Setting]) -> dict[str, object]:
    """Dotted settings as nested sections; `model` is in its short form."""
    sections: dict[str, object] = {}
    for setting in settings:
        section, _, name = setting.key.partition(".")
        if not name:
            sections[section] = setting.value
            continue
        inner = sections.setdefault(section, {})
        assert isinstance(inner, dict)
        inner[name] = setting.value
    return sections


def _method(choice: Choice, goal: Goal, method: _Method) -> None:
    adapter = method.config.adapter
    if adapter.method == "none":
        choice.add("adapter.method", "none", "all weights train: they fit into the memory")
        choice.add("optim.learning_rate", 2e-5, "the usual one for all weights")
        return
    choice.add("adapter.method", adapter.method, ADAPTER_REASONS[goal])
    choice.add("adapter.rank", adapter.rank, "the more there is to learn, the higher")
    choice.add("adapter.alpha", adapter.alpha, "twice the rank")
    if adapter.quantize != "none":
        choice.add("adapter.quantize", adapter.quantize, "the base fits only in 4 bits")
    choice.add("optim.learning_rate", 2e-4, "the usual one for an adapter")


def _needs(packing: Packing) -> str:
    """What a step takes of the memory, in words."""
    if packing.memory is None:
        return ""
    return f"a step needs {_size(packing.memory.peak)} of {_size(packing.available)}"


def _size(count: float) -> str:
    if count >= 2**28:
        return f"{count / 2**30:.1f} GiB"
    return f"{max(count / 2**20, 1):.0f} MiB"
