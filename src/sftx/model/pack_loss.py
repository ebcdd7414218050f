"""The module that turns a pack into its loss, and the paths by which it may do so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftx.model import attention
from sftx.model.adapter import bare, head_weights
from sftx.model.context_parallel import Context, times_of
from sftx.model.fallbacks import use_fallbacks
from sftx.model.forward_state import ForwardState
from sftx.model.loss import (
    PLAIN,
    LogitTransform,
    correct_weight,
    cross_entropy_sum,
    fused_cross_entropy_sum,
)
from sftx.model.mixture import cast_grouped_products
from sftx.model.padded import as_batch
from sftx.model.prefix_index import prefix_index
from sftx.model.regularization import embedding_noise, router_balance
from sftx.model.routing import Routers
from sftx.settings.schema import Loss
from sftx.types import Pack, UserError


@dataclass(frozen=True, slots=True)
class TensorPack:
    """A `Pack` as tensors on the device; `cu_seqlens_cpu` stays on the host.

    With a `context`, tokens and targets are those of this rank's `part`, and the segments those of
    the whole pack.
    """

    ids: Tensor  # int64[T]
    positions: Tensor  # int64[T]
    cu_seqlens_cpu: Tensor  # int32[n + 1]
    index: Tensor  # int64[M]
    label: Tensor  # int64[M]
    weight: Tensor  # float32[M]
    longest: int  # tokens of the longest segment, with its ancestors
    counts: tuple[int, ...]  # targets of each segment; () where they share prefixes
    examples: tuple[int, ...] = ()  # their numbers, by which noise is drawn
    times: tuple[int, ...] = ()  # how many examples each segment is part of
    prefixes: tuple[Tensor, ...] = ()  # `prefix_index`, where segments share them
    context: Context | None = None  # the ranks that compute the pack together

    def segments(self) -> dict[str, Any]:
        """What `attention` needs, under the names that transformers passes on to its kernels."""
        cu_seqlens = self.cu_seqlens_cpu.to(self.ids.device, non_blocking=True)
        known: dict[str, Any] = {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "cu_seqlens_cpu": self.cu_seqlens_cpu,
        }
        if self.context is None:  # recurrent layers begin anew where the segment is another
            tokens = torch.arange(len(self.ids), device=self.ids.device)
            segment = torch.bucketize(tokens, cu_seqlens[1:], right=True, out_int32=True)
            known["seq_idx"] = segment[None]
        if self.prefixes:
            known["prefix_index"] = [self.positions, *self.prefixes]
        if self.context is not None:
            for name, value in asdict(self.context).items():
                known[f"context_{name}"] = value
        return known

    def parts(self) -> Iterator[tuple[int, int, Tensor, slice]]:
        """Of every segment: (first token, one past the last, places of its targets in it, which
        targets of the pack they are).
        """
        assert not self.prefixes, "segments that share prefixes do not stand alone"
        first = 0
        bounds = itertools.pairwise(self.cu_seqlens_cpu.tolist())
        for (a, b), count in zip(bounds, self.counts, strict=True):
            mine = slice(first, first + count)
            first += count
            yield a, b, self.index[mine] - a, mine


def to_tensors(pack: Pack, device: torch.device, context: Context | None = None) -> TensorPack:
    """The pack as `PackLoss` takes it; of several ranks that compute it, this one's part.

    Copies leave pinned memory on the stream that will use them: nobody waits, and nothing has to be
    ordered.
    """

    def pinned(array: Any, dtype: torch.dtype) -> Tensor:
        tensor = torch.as_tensor(array).to(dtype)
        if device.type == "cuda":
            return tensor.pin_memory()
        return tensor

    def move(array: Any, dtype: torch.dtype) -> Tensor:
        return pinned(array, dtype).to(device, non_blocking=True)

    part = slice(None)
    mine = slice(None)
    first = 0
    if context is not None:
        pack = context.filled(pack)
        part = context.part(len(pack.ids))
        first = part.start
        begin, end = np.searchsorted(pack.index, [first, part.stop]).tolist()
        mine = slice(begin, end)
    index = [] if pack.parent is None else prefix_index(pack.cu_seqlens, pack.parent)
    counts: tuple[int, ...] = ()
    prefixes: tuple[Tensor, ...] = ()
    if index:
        assert context is None, "ranks that share a pack do not share prefixes"
        queries, keys, bounds, table = index
        on_device = [move(x, x.dtype) for x in (queries, keys, bounds)]
        prefixes = (*on_device, pinned(bounds, bounds.dtype), table)
    else:
        bounds = np.searchsorted(pack.index, pack.cu_seqlens)
        counts = tuple(np.diff(bounds).tolist())
    longest = int(np.diff(pack.cu_seqlens).max())
    deepest = int(pack.positions.max()) + 1
    return TensorPack(
        ids=move(pack.ids[part], torch.int64),
        positions=move(pack.positions[part], torch.int64),
        cu_seqlens_cpu=pinned(pack.cu_seqlens, torch.int32),
        index=move(pack.index[mine] - first, torch.int64),
        label=move(pack.label[mine], torch.int64),
        weight=move(pack.weight[mine], torch.float32),
        longest=max(longest, deepest),
        counts=counts,
        examples=pack.examples,
        times=times_of(pack),
        prefixes=prefixes,
        context=context,
    )


class Tally:
    """The weight of the targets of some packs whose argmax is right, a scalar float64."""

    def __init__(self, device: torch.device) -> None:
        self.correct = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, correct: Tensor) -> None:
        """Count those of a pack."""
        self.correct += correct


class CompiledLayer(NamedTuple):
    """A decoder layer and its two `forward` methods."""

    layer: nn.Module
    compiled: Callable[..., Any]
    own: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Paths:
    """How a pack is computed: by the fast paths, unless the start-up checks measured a difference.

    `isolate`: all segments at once, kept apart by `attention`. Else by the model's own attention:
    `padded`: all segments at once, as the rows of a batch; or one segment at a time. `forgets` is
    put back before such a pass: a model may remember something of the one before. `transform`:
    from the head's matrix product to the logits; None = logits come from the model's own forward.
    `compiled`: the layers that are. `shares_prefixes`: segments may have parents.
    """

    isolate: bool = True
    padded: bool = False
    transform: LogitTransform | None = field(default_factory=LogitTransform)
    forgets: ForwardState | None = None
    compiled: tuple[CompiledLayer, ...] = ()
    shares_prefixes: bool = False


class PackLoss(nn.Module):
    """A causal language model as the trainer sees it: a pack goes in, the weighted sum of its
    losses comes out.

    `model` may carry an adapter. `objective` holds while training; in evaluation the sum is the
    plain one. `noise_seed` is that of the step. With `keeps_gathered` a step gathers weights that
    are in shards once.
    """

    def __init__(self, model: PreTrainedModel, objective: Loss = PLAIN) -> None:
        super().__init__()
        self.model = model
        cast_grouped_products()
        self.objective = objective
        self.noise_seed = 0
        self.keeps_gathered = False
        self._noise: Tensor | None = None
        self._router_logits: tuple[Tensor, ...] = ()
        self._times: Tensor | None = None
        text = model.config.get_text_config()
        self._experts_per_token: int = getattr(text, "num_experts_per_tok", None) or 0
        self.routers = Routers(model, self._experts_per_token)
        if objective.router_aux:
            self.routers.check_balance(type(model).__name__)
        if objective.neftune_alpha:
            model.get_input_embeddings().register_forward_hook(self._add_noise)
        self._own_attention = model.config._attn_implementation or "eager"
        use_fallbacks(model)
        self.paths = Paths()
        self.use_segments(True)

    def train(self, mode: bool = True) -> Self:
        """Train, or evaluate; routers choose alike in both."""
        super().train(mode)
        self.routers.serve()
        return self

    def take(self, paths: Paths) -> None:
        """Compute by `paths` from now on."""
        self.paths = paths
        self.use_segments(True)

    def use_segments(self, on: bool) -> None:
        """Compute as `paths` says (training), or as the model does by itself (generation,
        reference): with its own attention, and not compiled, as a graph for every length that is
        generated would not pay.
        """
        by_segments = on and self.paths.isolate
        self.model.set_attn_implementation(attention.NAME if by_segments else self._own_attention)
        for layer, compiled, own in self.paths.compiled:
            layer.forward = compiled if on else own

    def forward(self, pack: TensorPack, tally: Tally | None = None) -> Tensor:
        """The sum over targets, a float32 scalar; of no targets it is 0, with a gradient of 0 for
        every weight. `tally` counts the targets whose argmax is right.
        """
        assert self.paths.shares_prefixes or not pack.prefixes, "the checks did not allow parents"
        tally = tally or Tally(pack.ids.device)
        objective = self.objective if self.training else PLAIN
        if objective.neftune_alpha:
            self._noise = self._draw_noise(pack)
        self._times = self._token_times(pack)
        if not (self.paths.isolate or self.paths.padded):
            return self._one_by_one(pack, objective, tally)
        if self.paths.transform is None:
            logits = self.own_logits(pack)
            tally.add(correct_weight(logits, pack.label, pack.weight))
            total = cross_entropy_sum(logits, pack.label, pack.weight, objective)
        else:
            hidden = self.hidden(pack).index_select(0, pack.index)
            head, bias = head_weights(self.model)
            total, correct = fused_cross_entropy_sum(
                hidden, head, bias, pack.label, pack.weight, self.paths.transform, objective
            )
            tally.add(correct)
        if objective.router_aux:
            total = total + self._balance(pack.cu_seqlens_cpu, pack.index, pack.weight)
        return total

    def hidden(self, pack: TensorPack) -> Tensor:
        """Hidden states after the final norm, [T, h]."""
        if self.paths.padded:
            return self._padded(self.model.base_model, pack, "last_hidden_state")
        positions = pack.positions[None]
        ids = pack.ids[None]
        out = self._run(self.model.base_model, ids, position_ids=positions, **pack.segments())
        return out.last_hidden_state[0]

    def own_logits(self, pack: TensorPack) -> Tensor:
        """Logits [M, V] at `pack.index` through the model's own forward, whatever it does after the
        head.
        """
        if self.paths.padded:
            return self._padded(self.model, pack, "logits")[pack.index]
        index = pack.index
        more = {"position_ids": pack.positions[None], **pack.segments()}
        # Where segments share prefixes, targets may be as many as tokens.
        keeps = len(index) != len(pack.ids)
        if keeps:
            more["logits_to_keep"] = index
        logits = self._run(self.model, pack.ids[None], **more).logits[0]
        # Some models ignore it.
        if keeps and len(logits) == len(index):
            return logits
        return logits[index]

    def logits_one_by_one(self, pack: TensorPack) -> Tensor:
        """Logits [M, V] at `pack.index`, segments one at a time."""
        logits = []
        for a, b, at, _ in pack.parts():
            of_segment = self._logits_alone(pack.ids[a:b])
            logits.append(of_segment[at])
        return torch.cat(logits)

    def _logits_alone(self, ids: Tensor) -> Tensor:
        """Logits [T, V] of one segment, whatever ran before it."""
        if self.paths.forgets is not None:
            self.paths.forgets.put_back()
        return self._run(self.model, ids[None]).logits[0]

    def _padded(self, module: Any, pack: TensorPack, name: str) -> Tensor:
        """What `module` returns by that name for the pack as a batch, [T, C]."""
        if self.paths.forgets is not None:
            self.paths.forgets.put_back()
        batch = as_batch(pack.cu_seqlens_cpu, pack.ids.device)
        if self._noise is not None:
            self._noise = self._noise.to(pack.ids.device)[batch.rows]
        if self._times is not None:
            self._times = batch.padded(self._times)
        # AttributeError where the model has no such part, as in `hidden`: its speed is then unknown.
        found: Tensor = getattr(self._run(module, pack.ids[batch.rows]), name)
        self._router_logits = tuple(map(batch.flat, self._router_logits))
        return batch.flat(found)

    def _one_by_one(self, pack: TensorPack, objective: Loss, tally: Tally) -> Tensor:
        total = torch.zeros((), device=pack.ids.device)
        noise, times = self._noise, self._times
        for a, b, at, mine in pack.parts():
            # A pack of nothing still passes through all weights, see `forward`.
            if not len(at) and len(pack.index):
                continue
            self._noise = None if noise is None else noise[a:b]
            self._times = None if times is None else times[a:b]
            logits = self._logits_alone(pack.ids[a:b])[at]
            label = pack.label[mine]
            weight = pack.weight[mine]
            total = total + cross_entropy_sum(logits, label, weight, objective)
            tally.add(correct_weight(logits, label, weight))
            if objective.router_aux:
                total = total + self._balance(torch.tensor([0, b - a]), at, weight)
        return total

    def _run(self, module: Any, ids: Tensor, **inputs: Any) -> Any:
        """The module's output for `ids` [rows, tokens]; its routers' logits are kept where the
        objective needs them.
        """
        # Once, as with noise.
        times, self._times = self._times, None
        balances = bool(self.training and self.objective.router_aux)
        if balances:
            inputs["output_router_logits"] = True
        with self.routers.watching(times):
            out = module(input_ids=ids, use_cache=False, **inputs)
        if not balances:
            return out
        self._router_logits = getattr(out, "router_logits", None) or ()
        if not self._router_logits:
            name = type(self.model).__name__
            raise UserError(f"loss.router_aux: {name} does not return its routers' logits")
        return out

    def _balance(self, cu_seqlens_cpu: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The experts' balance of each segment times the weight of its targets, summed."""
        cu_seqlens = cu_seqlens_cpu.to(index.device, non_blocking=True)
        segment = torch.bucketize(index, cu_seqlens[1:], right=True)
        share = torch.zeros(len(cu_seqlens) - 1, device=weight.device)
        share.index_add_(0, segment, weight)
        balance = router_balance(self._router_logits, self._experts_per_token, cu_seqlens, share)
        self._router_logits = ()
        return self.objective.router_aux * balance

    def _token_times(self, pack: TensorPack) -> Tensor | None:
        """float64[T]: how many examples each token is part of; None where no router is watched."""
        if not (self.training and self.routers.modules and pack.times):
            return None
        lengths = np.diff(pack.cu_seqlens_cpu.tolist())
        times = torch.from_numpy(np.repeat(np.array(pack.times, np.float64), lengths))
        if pack.context is not None:
            times = times[pack.context.part(len(times))]
        return times.to(pack.ids.device)

    def _draw_noise(self, pack: TensorPack) -> Tensor:
        """[T, h]; an example meets the same noise in a step wherever its pack puts it, and whichever
        ranks compute it.
        """
        lengths = pack.cu_seqlens_cpu.diff().tolist()
        width = int(bare(self.model.get_input_embeddings()).weight.shape[1])
        numbers = pack.examples or range(len(lengths))
        seeds = [self.noise_seed * 1_000_003 + example for example in numbers]
        noise = embedding_noise(lengths, width, self.objective.neftune_alpha, seeds)
        if pack.context is None:
            return noise
        return noise[pack.context.part(len(noise))]

    def _add_noise(self, _module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        # Once: whatever runs the model next is not this training pack.
        noise = self._noise
        self._noise = None
        if noise is None:
            return out
        return out + noise.to(out)
