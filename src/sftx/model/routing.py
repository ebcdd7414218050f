"""What the routers of a mixture of experts do with the tokens of a step: how evenly they choose,
and how many tokens each expert gets.

Sums over tokens alone are kept, so that nothing depends on how a step is cut into packs and ranks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from sftx.types import UserError

BALANCE, LARGEST, SMALLEST, UNUSED = "balance", "largest_load", "smallest_load", "unused"
NUMBERS = (BALANCE, LARGEST, SMALLEST, UNUSED)
"""What the record says of the routers, see `router_numbers`."""
_GIVE_PROBABILITIES = {"Gemma4TextRouter", "DiffusionGemmaTextRouter"}
"""Routers whose "logits" are probabilities already."""
UNKNOWN = "unknown"


class Routers:
    """The routers of `model`, watched while the packs of a step are computed; none where it has
    none.

    `top_k`: how many experts a router chooses that does not tell which. `scores`: see `_scores`.
    """

    def __init__(self, model: nn.Module, top_k: int) -> None:
        found = dict(_routers(model))
        self.modules = list(found)
        self.top_k = top_k
        self.scores = {_scores(module) for module in found}
        self._watched = [_Watched(i, top_k, _scores(module)) for module, i in found.items()]
        for module, watched in zip(found, self._watched, strict=True):
            module.register_forward_hook(watched.add)

    def serve(self) -> None:
        """Let routers choose as they do when the model is served, while all else trains."""
        for module in self.modules:
            module.training = False

    def choose_otherwise(self) -> bool:
        """Whether some would choose in another way while they train."""
        return any("training" in _names(module) for module in self.modules)

    def check_balance(self, name: str) -> None:
        """Refuse `loss.router_aux` where it is not what the model `name` chooses by."""
        if self.scores - {"softmax"}:
            raise UserError(
                "loss.router_aux balances experts that are chosen by a softmax of logits; the "
                f"routers of {name} do not give these; leave it out"
            )
        if not self.top_k:
            raise UserError(f"loss.router_aux: {name} has no experts to balance; leave it out")

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

    def __init__(self, index: int, top_k: int, scores: str) -> None:
        self.index, self.top_k, self.scores = index, top_k, scores
        self.times: Tensor | None = None
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, _module: nn.Module, _inputs: Any, out: Any) -> None:
        """Add what the router gave, `out`, for the tokens of a pack."""
        outputs = out if isinstance(out, tuple) else (out,)
        logits = outputs[self.index]
        if self.sums is None:  # before a layer is compiled, so that its graph has always some
            shape = (2, logits.shape[-1])
            self.sums = torch.zeros(shape, dtype=torch.float64, device=logits.device)
        if self.times is None:
            return
        probability = _probability(logits.reshape(-1, logits.shape[-1]), self.scores)
        chosen = [x for x in outputs if x.dtype == torch.int64]
        choice = chosen[0] if chosen else probability.topk(self.top_k).indices
        choice = choice.reshape(len(probability), -1)
        times = self.times[:, None].expand_as(choice)
        self.sums[0].index_add_(0, choice.flatten(), times.flatten())
        # A product in float64, which autocast leaves alone: a tenth of the time of a sum over rows.
        self.sums[1] += self.times @ probability.double()


def _probability(logits: Tensor, scores: str) -> Tensor:
    """float32[T, E], rows that sum to 1.

    Sigmoids are divided by their sum, as DeepSeek-V3 balances them (arXiv:2412.19437, equations 17
    to 20).
    """
    if scores == "given":
        return logits
    if scores == "sigmoid":
        score = logits.float().sigmoid()
        return score / score.sum(-1, keepdim=True)
    return logits.float().softmax(-1)


def _names(router: nn.Module) -> set[str]:
    """The names of functions and attributes in the code of a router."""
    return {*inspect.unwrap(type(router).forward).__code__.co_names}


def _scores(router: nn.Module) -> str:
    """`softmax` or `sigmoid`, as its code makes scores of logits; `given` where its "logits" are
    probabilities; `unknown` where its code calls neither, or both by a setting.
    """
    if type(router).__name__ in _GIVE_PROBABILITIES:
        return "given"
    called = _names(router) & {"sigmoid", "softmax"}
    return called.pop() if len(called) == 1 else UNKNOWN


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


def router_numbers(sums: Tensor, scores: set[str]) -> Tensor:
    """`NUMBERS` of a step, float64[4], from the sums of all its tokens; [0] where there are none.

    The balance is E * sum_e f_e P_e, what `loss.router_aux` multiplies, over the tokens of the step
    and all layers: f = mean choices of expert e, P = its mean probability (Switch Transformer,
    equations 4 to 6). It is the number of experts per token where all are chosen alike, and more
    where they are not. Loads are the share of the tokens that an expert of a layer gets: the
    largest, the smallest, and how many experts of all layers get no token. The balance is not a
    number where the `scores` of some router are unknown.
    """
    if not sums.numel():
        return sums.flatten()
    tokens = sums[:, 1].sum(-1, keepdim=True)
    load, probability = sums[:, 0] / tokens, sums[:, 1] / tokens
    balance = sums.shape[-1] * (load.mean(0) * probability.mean(0)).sum()
    if UNKNOWN in scores:
        balance = balance * math.nan
    unused = (load == 0).sum().double()
    return torch.stack([balance, load.max(), load.min(), unused])
