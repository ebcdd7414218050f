"""A small stand-in for a model: the same class and the same kinds of layers, few of them, narrow,
with random weights.

What a model does at which position is decided by its code and by the numbers of its configuration,
not by its weights. So whatever depends on length can be tried on a copy that costs next to nothing,
over examples as long as the real ones. Widths, the vocabulary and the number of layers and experts
become small; every other number stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from sftx.model.checkpointing import decoder_layers
from sftx.model.checks.widths import (
    EXPERTS,
    HEADS,
    HIDDEN,
    INNER,
    KEY_HEADS,
    LAYERS,
    LIMITS,
    LINEAR_HEADS,
    MIXERS,
)

FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What the code of a model raises where a configuration or an argument does not suit it."""

Settings = dict[str, Any]
"""A configuration, or a section of it."""

LARGEST_COPY = 60_000_000
"""Parameters of a copy whose widths could not be made small."""


def stand_in(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel | None:
    """A small copy of `model` in float64 on the CPU, in evaluation mode; None where none can be
    made.

    The narrowest one of the same kinds of layers that can be built and computes finite logits.
    """
    depth = _depth(model)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # of token ids beyond the small vocabulary, for one
    try:
        for narrow in (_narrow, _narrow_with_whole_heads, lambda settings: settings):
            made = _build(model, narrow, depth, seed)
            if made is not None:
                return made
    finally:
        transformers_logging.set_verbosity(level)
    return None


def _build(
    model: PreTrainedModel, narrow: Callable[[Settings], Settings], depth: int, seed: int
) -> PreTrainedModel | None:
    settings = copy.deepcopy(model.config.to_dict())
    for name in (
        "quantization_config",
        "transformers_version",
        "dtype",
        "_name_or_path",
        "id2label",
        "label2id",
    ):
        settings.pop(name, None)
    settings = _few_layers(narrow(settings), len(decoder_layers(model)), depth)
    try:
        config = type(model.config).from_dict(settings)
        config.use_cache = False
        with torch.device("meta"):
            size = sum(p.numel() for p in own_class(model)(config).parameters())
        if size > LARGEST_COPY:
            return None
        with _own_random_numbers(seed):
            made: Any = own_class(model)(config)
            _spread(made)
        made = made.double().eval()
        if hasattr(made, "set_experts_implementation"):
            made.set_experts_implementation("eager")  # the grouped kernels have no float64
        if kinds_of_layers(made) != kinds_of_layers(model)[: len(decoder_layers(made))]:
            return None
        ids = torch.arange(3, 12)[None] % vocabulary(made)
        with torch.no_grad():
            logits = copy.deepcopy(made)(input_ids=ids, use_cache=False).logits
    except FOREIGN_ERRORS:
        return None
    if bool(logits.isfinite().all()):
        return made
    return None


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens have an embedding and a row of the head."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return min(len(end.weight) for end in ends if end is not None)


def kinds_of_layers(model: nn.Module) -> list[tuple[Any, ...]]:
    """What every decoder layer is, apart from its widths: the classes inside it, without adapters."""
    return [tuple(_classes_inside(layer, "")) for layer in decoder_layers(model)]


def _classes_inside(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """(path, class) of `module` and all modules in it; an adapted one counts as what is beneath the
    adapter.
    """
    if isinstance(module, BaseTunerLayer):
        yield from _classes_inside(module.get_base_layer(), path)
        return
    yield path, "Linear" if isinstance(module, nn.Linear) else own_class(module).__name__
    for name, child in module.named_children():
        yield from _classes_inside(child, f"{path}.{name}")


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of one in shards, that which it had before."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _depth(model: PreTrainedModel) -> int:
    """How many of the first layers hold every kind of layer; at least two."""
    layers = decoder_layers(model)
    kinds = list(zip(kinds_of_layers(model), _facts_of_layers(model), strict=True))
    seen: list[Any] = []
    depth = min(2, len(layers))
    for number, kind in enumerate(kinds):
        if kind not in seen:
            seen.append(kind)
            depth = max(depth, number + 1)
    return depth


def _facts_of_layers(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The plain values that every layer and its modules hold, but for those that number the layers."""
    layers = decoder_layers(model)
    facts = [_plain_values(layer) for layer in layers]
    for name in set().union(*facts):
        if _numbers_layers(facts, name, 1) or _numbers_layers(facts, name, 2):
            for found in facts:
                found.pop(name, None)
    for name, values in _lists_by_layer(model.config.to_dict(), len(layers)):
        for found, value in zip(facts, values, strict=True):
            found[name] = value
    return facts


def _numbers_layers(facts: list[Settings], name: str, parts: int) -> bool:
    """Whether what goes by that name numbers the layers, or `parts` parts of each."""
    for number, found in enumerate(facts):
        value = found.get(name, number * parts)
        if not isinstance(value, int) or value // parts != number:
            return False
    return True


def _plain_values(layer: nn.Module) -> Settings:
    """Numbers, texts and switches of a layer and its modules, by path and name."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if name != "training" and isinstance(value, bool | int | float | str):
                found[f"{path}.{name}"] = value
    return found


def _lists_by_layer(settings: Settings, layers: int) -> Iterator[tuple[str, list[Any]]]:
    """(name, value) of the settings that say something of every layer."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _lists_by_layer(value, layers)
        elif isinstance(value, list) and len(value) == layers and value != list(range(layers)):
            yield name, value


def _few_layers(settings: Settings, layers: int, depth: int) -> Settings:
    """The settings of a model of the first `depth` of its `layers` layers."""
    if not layers:
        return settings
    few: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            few[name] = _few_layers(_of_first_layers(value, layers, depth), layers, depth)
        elif name in LAYERS and value == layers:
            few[name] = depth
        elif name == "num_kv_shared_layers":  # the last ones
            few[name] = max(0, (value or 0) - layers + depth)
        elif isinstance(value, list):
            few[name] = _few_of_list(str(name), value, layers, depth)
        else:
            few[name] = value
    return few


def _few_of_list(name: str, value: list[Any], layers: int, depth: int) -> list[Any]:
    """A list of a configuration, without what it says of layers that are gone."""
    if len(value) == layers and layers > 1:
        return value[:depth]
    if name.endswith("_layers"):  # the numbers of some layers
        return [one for one in value if not isinstance(one, int) or one <= depth]
    return value


def _of_first_layers(settings: dict[Any, Any], layers: int, depth: int) -> dict[Any, Any]:
    """Settings that go by the number of a layer, without those of layers that are gone; others as
    they are.
    """
    numbers = [int(name) for name in settings if str(name).isdecimal()]
    if len(numbers) != len(settings) or not all(number < layers for number in numbers):
        return settings
    return {name: value for name, value in settings.items() if int(name) < depth}


def _narrow(settings: Settings) -> Settings:
    """Everything narrow, heads included."""
    return _narrowed(settings, head_dim=16)


def _narrow_with_whole_heads(settings: Settings) -> Settings:
    """Heads as wide as they are: some lists of a configuration have an entry for each of their
    channels.
    """
    return _narrowed(settings, head_dim=None)


def _narrowed(settings: Settings, head_dim: int | None) -> Settings:
    heads = _first_number(settings, HEADS)
    numbers = _narrow_widths(settings, heads, head_dim)
    groups = settings.get("n_group") or settings.get("num_expert_group") or 1
    few: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            few[name] = _narrowed(value, head_dim)
        elif str(name).endswith("_token_id"):
            few[name] = _small_ids(value)
        elif name in numbers and isinstance(value, int):
            few[name] = numbers[name]
        else:
            few[name] = _narrow_value(name, value, heads, groups)
    return few | _heads_of_mixer(few, numbers["hidden_size"])


def _narrow_widths(settings: Settings, heads: int, head_dim: int | None) -> dict[str, int]:
    """The number of heads and what goes with it, by name; `heads` = how many there were."""
    few_heads = min(heads, 4)
    width = head_dim or 16
    if head_dim is None and heads:
        width = _first_number(settings, HIDDEN) // heads
    numbers = dict.fromkeys(HEADS, few_heads) | dict.fromkeys(HIDDEN, width * few_heads or 64)
    if head_dim is not None:
        numbers["head_dim"] = head_dim
    return numbers


def _narrow_value(name: str, value: Any, heads: int, groups: int) -> Any:
    """Any other value: numbers, and lists with a width for each layer, small."""
    if isinstance(value, list) and name in INNER:
        return [min(width, LIMITS[name]) for width in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return _narrow_number(name, value, heads, groups)


def _narrow_number(name: str, value: int, heads: int, groups: int) -> int:
    """Any other number: small where it is a width; `groups` of experts must have some each."""
    if name in KEY_HEADS:
        return min(heads, 4) if value == heads else min(value, 2)
    if name in EXPERTS:
        return min(value, 4 * groups)
    if name in LINEAR_HEADS:
        return max(1, value // 8)
    return min(value, LIMITS.get(name, value))


def _heads_of_mixer(settings: Settings, width: int) -> dict[str, int]:
    """As many heads as a mixer with states has in a model of that width; nothing where it has
    none.
    """
    for expand, heads, size in MIXERS:
        found = [settings.get(name) for name in (expand, heads, size)]
        if all(isinstance(value, int | float) for value in found):
            inner = int(settings[expand] * width)
            return {heads: max(inner // 16, 1), size: min(inner, 16)}
    return {}


def _first_number(settings: Settings, names: set[str]) -> int:
    """The first whole number of settings that goes by one of the names; 0 where there is none."""
    for name, value in settings.items():
        if name in names and isinstance(value, int):
            return value
    return 0


def _small_ids(value: Any) -> Any:
    """Ids of tokens, or a list of them, inside a small vocabulary."""
    if isinstance(value, list):
        return [_small_ids(one) for one in value]
    if isinstance(value, int):
        return value % 128
    return value


def _spread(model: nn.Module) -> None:
    """Larger weights than a model starts with, so that attention is far from uniform; none that is
    not a number.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for tensor in (*model.parameters(), *model.buffers()):
        is_weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        if is_weight and not bool(tensor.isfinite().all()):
            nn.init.normal_(tensor, std=0.02)


@contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """A stream of random numbers of its own inside; that outside goes on as if nothing had been
    drawn.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
