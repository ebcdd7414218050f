"""What the routers of a mixture of experts do with the tokens of a step: how evenly they choose,
and how many tokens each expert gets.

Sums over tokens alone are kept, so that nothing depends on how a step is cut into packs and ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

BALANCE, LARGEST, SMALLEST, UNUSED = "balance", "largest_load", "smallest_load", "unused"
NUMBERS = (BALANCE, LARGEST, SMALLEST, UNUSED)
"""What the record says of the routers, see `router_numbers`."""
_GIVE_PROBABILITIES = {"Gemma4TextRouter", "DiffusionGemmaTextRouter"}
"""Routers whose "logits" are probabilities already."""


class Routers:
    """The routers of `model`, watched while the packs of a step are computed; none where it has
    none.

    `top_k`: how many experts a router chooses that does not tell which.
    """

    def __init__(self, model: nn.Module, top_k: int) -> None:
        found = dict(_routers(model))
        self.modules = list(found)
        self._watched = [_Watched(index, top_k) for index in found.values()]
        for module, watched in zip(found, self._watched, strict=True):
            module.register_forward_hook(watched.add)

    def restart(self) -> None:
        """Forget what was added: a step begins."""
        for watched in self._watched:
            if watched.sums is not None:
                watched.sums.zero_()

    @contextmanager
    def watching(self, times: Tensor | None) -> Iterator[None]:
        """What the model computes inside is added, each of its tokens so many times, float64[T];
        nothing is, where these are None.
        """
        for watched in self._watched:
            watched.times = times
        try:
            yield
        finally:
            # What is computed again, going backward, was added already.
            for watched in self._watched:
                watched.times = None

    def sums(self, device: torch.device) -> Tensor:
        """float64[routers, 2, experts]: how often each expert was chosen, and the sum of its
        probabilities.
        """
        found = [watched.sums for watched in self._watched if watched.sums is not None]
        return torch.stack(found) if found else torch.zeros(0, 2, 0, device=device).double()


class _Watched:
    """One router: `sums`, float64[2, experts], of the tokens that count `times`, float64[T]."""

    def __init__(self, index: int, top_k: int) -> None:
        self.index, self.top_k = index, top_k
        self.times: Tensor | None = None
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, module: nn.Module, _inputs: Any, out: Any) -> None:
        """Add what the router gave, `out`, for the tokens of a pack."""
        outputs = out if isinstance(out, tuple) else (out,)
        logits = outputs[self.index]
        if self.sums is None:  # before a layer is compiled, so that its graph has always some
            shape = (2, logits.shape[-1])
            self.sums = torch.zeros(shape, dtype=torch.float64, device=logits.device)
        if self.times is None:
            return
        probability = logits.reshape(-1, logits.shape[-1]).float()
        if type(module).__name__ not in _GIVE_PROBABILITIES:
            probability = probability.softmax(-1)
        chosen = [x for x in outputs if x.dtype == torch.int64]
        choice = chosen[0] if chosen else probability.topk(self.top_k).indices
        choice = choice.reshape(len(probability), -1)
        times = self.times[:, None]
        self.sums[0].index_add_(0, choice.flatten(), times.expand_as(choice).flatten())
        self.sums[1] += (probability * times).sum(0)


def _routers(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The routers, some of them twice, and which of their outputs transformers records as their
    logits.
    """
    for part in model.modules():
        known = part._can_record_outputs if isinstance(part, PreTrainedModel) else None
        recorder = (known or {}).get("router_logits")
        if isinstance(recorder, OutputRecorder):
            for module in part.modules():
                if isinstance(module, recorder.target_class):
                    yield module, recorder.index


def router_numbers(sums: Tensor) -> Tensor:
    """`NUMBERS` of a step, float64[4], from the sums of all its tokens; [0] where there are none.

    The balance is E * sum_e f_e P_e, what `loss.router_aux` multiplies, over the tokens of the step
    and all layers: f = mean choices of expert e, P = its mean probability (Switch Transformer,
    equations 4 to 6). It is the number of experts per token where all are chosen alike, and more
    where they are not. Loads are the share of the tokens that an expert of a layer gets: the
    largest, the smallest, and how many experts of all layers get no token.
    """
    if not sums.numel():
        return sums.flatten()
    tokens = sums[:, 1].sum(-1, keepdim=True)
    load, probability = sums[:, 0] / tokens, sums[:, 1] / tokens
    balance = sums.shape[-1] * (load.mean(0) * probability.mean(0)).sum()
    unused = (load == 0).sum().double()
    return torch.stack([balance, load.max(), load.min(), unused])
