"""What an adapter does to a model, in words, and the parts of a mixture of experts that it treats
apart.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Names, in transformers, of the modules that choose experts or their weights."""


def cast_grouped_products() -> None:
    """Let autocast cast the products of experts as it casts every other product.

    PyTorch has no rule for `aten::_grouped_mm` (torch 2.11 to 2.13): over float32 weights experts
    would be computed in float32, which on a GPU is not one kernel but one product after the other.
    """
    name = "aten::_grouped_mm"
    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            torch.library.register_autocast(name, device, torch.bfloat16)


def routers(model: nn.Module) -> list[str]:
    """The full names of the routers: modules of such a name beside a module of experts."""
    found = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        if "experts" in children:
            found += [f"{path}.{name}" for name in children if name in ROUTERS]
    return found


def has_joint_experts(model: nn.Module) -> bool:
    """Whether the weights of all experts of a layer are one parameter [experts, out, in]."""
    return any(
        parameter.ndim == 3
        for path, module in model.named_modules()
        if path.endswith("experts")
        for parameter in module.parameters(recurse=False)
    )


def shared_adapters(model: nn.Module) -> list[str]:
    """The names of adapted modules whose own weight stands in several places: in another layer, or
    in the embeddings that the head is tied to.
    """
    adapted: dict[int, str] = {}
    places: dict[int, int] = defaultdict(int)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoraLayer):
            weight = getattr(module.get_base_layer(), "weight", None)
            adapted.setdefault(id(weight), path)
        elif "weight" in module._parameters:
            places[id(module.weight)] += 1
    return [path for weight, path in adapted.items() if places[weight] > 1]


def describe_adapter(model: nn.Module) -> str:
    """What is adapted, by kind of module: how many of it, and how many parameters the adapter has
    there; empty where nothing is.
    """
    adapted = _adapted_kinds(model)
    if not adapted:
        return ""
    kinds = [f"{kind} x {count} ({size:,})" for kind, (count, size) in sorted(adapted.items())]
    of_experts = _describe_experts(model, set(adapted))
    return "; ".join([f"the adapter is in (parameters): {', '.join(kinds)}", *of_experts])


def _adapted_kinds(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By kind of adapted module: how many there are, and how many parameters the adapter has there."""
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            kind = _kind(path)
            counts[kind] += not path.endswith("base_layer")
            own = [p for part in (module.lora_A, module.lora_B) for p in part.parameters()]
            sizes[kind] += sum(math.prod(p.shape) for p in own)
    return {kind: (count, sizes[kind]) for kind, count in counts.items()}


def _describe_experts(model: nn.Module, kinds: set[str]) -> list[str]:
    """What an adapter in these kinds of modules does to experts and routers."""
    said = []
    if any("experts" in kind.split(".") for kind in kinds):
        said.append("every expert has a pair of matrices of its own, of the full rank")
    elif has_joint_experts(model):
        said.append("experts are left as they are")
    names = {kind.split(".")[-1] for kind in kinds}
    if routers(model) and not names & ROUTERS:
        said.append("routers are left alone (name them in adapter.targets to adapt them)")
    return said


def _kind(path: str) -> str:
    """The name of a module without the numbers of layers, and without peft's own."""
    names = [
        name
        for name in path.split(".")
        if name not in ("base_layer", "base_model") and not name.isdigit()
    ]
    return ".".join(names[-2:] if "experts" in names[-2:] else names[-1:])
