"""What runs find out about equal models before their first step, found out once in a process.

Predicting the memory and the time of a step, and trying whether segments are kept apart, take most
of the time of a run of a tiny model. A test run has hundreds of them, of a few dozen models. What
runs alone find is remembered: tests that ask for a prediction or for a check themselves get one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

from sftx.model import flops
from sftx.model.checks import isolation, start
from sftx.model.checks.probe import places, reach, segment_lengths
from sftx.model.checks.stand_in import kinds_of_layers, own_class
from sftx.model.memory import Marks, MemoryEstimator
from sftx.types import Pack

Found = TypeVar("Found")

_FOUND: dict[Hashable, Any] = {}


def once(key: Hashable, find: Callable[[], Found]) -> Found:
    """What `find` gives, or gave for an equal `key`. Without a key it is always called, and again
    where it found nothing: a time that could not be told.
    """
    if key is None:
        return find()
    if _FOUND.get(key) is None:
        _FOUND[key] = find()
    return _FOUND[key]


class RememberingEstimator(MemoryEstimator):
    """Measures equal steps of equal models once."""

    def _measure_step(self, pack: Pack, depth: int, every: bool, accumulate: bool) -> Marks:
        def measure() -> Marks:
            return MemoryEstimator._measure_step(self, pack, depth, every, accumulate)

        model = estimated(self)
        if model is None:
            return measure()
        return once(("memory", model, shape_of(pack), depth, every, accumulate), measure)


def reached_speed(estimator: MemoryEstimator, pack: Pack) -> float | None:
    """As that of sftx; of equal layers it is the speed that was reached first."""
    key = None
    model = estimated(estimator) if isinstance(estimator, RememberingEstimator) else None
    if model is not None:
        key = ("speed", model, shape_of(pack), torch.get_num_threads())
    return once(key, lambda: flops.reached_speed(estimator, pack))


def measure_isolation(
    model: PreTrainedModel, longest: int, largest_pack: int
) -> isolation.Isolation:
    """As that of sftx, whose stand-in is made from the class and the configuration alone."""
    key = None
    if not is_patched(model):
        settings = model.config.to_dict()
        lengths = segment_lengths(settings, longest)
        key = (
            "isolation",
            own_class(model),
            settings_of(model),
            str(kinds_of_layers(model)),
            reach(settings, longest),
            tuple(lengths),
            tuple(places(settings, lengths, largest_pack)),
        )
    return once(key, lambda: isolation.measure_isolation(model, longest, largest_pack))


def check_paths(*args: Any) -> list[str]:
    """The check of a run, with what was found of an equal stand-in."""
    with patch.object(start, "measure_isolation", measure_isolation):
        return start.check_paths(*args)


def estimated(estimator: MemoryEstimator) -> Hashable:
    """All that the memory and the time of a step depend on, apart from the pack; None where that
    is not told in a few words.
    """
    loss = estimator.loss
    paths = loss.paths
    if is_patched(loss) or paths.forgets or paths.compiled:
        return None
    if estimator.context is not None or estimator.shards is not None:
        return None
    tensors = [*loss.named_parameters(), *loss.named_buffers()]
    return (
        repr(loss),
        settings_of(loss.model),
        repr(loss.objective),
        (paths.isolate, paths.padded, paths.transform, paths.shares_prefixes),
        estimator.machine,
        tuple(
            (name, tensor.shape, tensor.dtype, tensor.requires_grad, tensor in estimator.packed)
            for name, tensor in tensors
        ),
    )


def settings_of(model: Any) -> str:
    """The configuration of a model, without the folder it was read from."""
    settings = model.config.to_dict()
    settings.pop("_name_or_path", None)
    return json.dumps(settings, sort_keys=True, default=str)


def shape_of(pack: Pack) -> Hashable:
    """How long a pack and its segments are, and how much of it is trained."""
    return len(pack.ids), pack.cu_seqlens.tobytes(), pack.index.tobytes()


def is_patched(module: nn.Module) -> bool:
    """Whether a test gave any module inside a forward of its own."""
    return any("forward" in vars(each) for each in module.modules())


@contextmanager
def remembering() -> Iterator[None]:
    """Runs remember what they find out before the first step."""
    with (
        patch("sftx.training.build.MemoryEstimator", RememberingEstimator),
        patch("sftx.training.build.check_paths", check_paths),
        patch("sftx.training.memory_plan.reached_speed", reached_speed),
    ):
        yield
