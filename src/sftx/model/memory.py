"""Peak memory of a step, predicted before the first one on tensors without contents.

The very module that trains runs forward and backward on fake tensors (PyTorch's FakeTensorMode:
shapes and dtypes, no data), while a dispatch mode counts the bytes that are alive. So every family,
adapter and precision is predicted by what it does, and no formula has to follow it. Equal layers
are measured two and three deep, and extended linearly.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftx.model import attention
from sftx.model.checkpointing import decoder_layers, recompute
from sftx.model.compile import KEPT
from sftx.model.context_parallel import Context
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.model.runtime import Machine
from sftx.types import Pack

HEAP = 400 << 20
"""Bytes that kernels of a CPU and the gaps of its heap take on top (from the smaller shape of
bench/memory.py; a model that is smaller than that takes no more than its own size). Not on a
GPU, where the peak of what is allocated is predicted, and `memory_plan.MARGIN` is for the rest.
"""
FIRST_USE = 60 << 20
"""Bytes that libraries and the start-up checks take after `base` was measured: 58 to 66 MiB where
measured. It counts for small models; in `HEAP` it is included.
"""
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: with a scale of a byte per 64, and a float32 per 256 of these
(arXiv:2305.14314).
"""
Marks = NDArray[np.float64]
"""Bytes of one pack, beside weights, earlier gradients and optimiser: what the layers keep for the
backward pass, and three peaks: of the forward pass with the loss, of the backward pass through the
last layer, and of the rest.
"""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process at the peak of a step, by what takes them."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments, float32
    activations: int  # kept by the layers for the backward pass
    workspace: int  # loss, temporary tensors, gathered shards
    allocator: int  # beside all tensors
    base: int  # what the process takes without a model

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


class MemoryEstimator:
    """Predicts the memory of `loss`, whose parameters may be on the meta device and stay untouched.

    `machine` = where it will run, which need not be here; `base` = bytes reserved there
    before a model. `shards` says over how many processes `fully_shard` spreads weights, gradients and
    optimiser; None = not in use. `nf4`: the layers' frozen matrices, which `loss` has as they are,
    will hold 4 bits a weight, be made whole one at a time, and be the same on every process.
    `compiled` is to be set where the layers will be, `context` where processes compute a pack
    together.
    """

    def __init__(
        self,
        loss: PackLoss,
        machine: Machine,
        base: int,
        shards: int | None = None,
        nf4: bool = False,
    ):
        self.loss = loss
        self.layers = decoder_layers(loss.model)
        self.machine = machine
        self.precision = machine.precision
        self.base = base
        self.shards = shards
        self.on_gpu = machine.device.type == "cuda"
        self.compiled = False
        self.context: Context | None = None
        self.packed: set[nn.Parameter] = set()
        if nf4:
            weights = self.layers.parameters()
            self.packed = {p for p in weights if p.ndim == 2 and not p.requires_grad}
        self.weights = _bytes({*loss.parameters(), *loss.buffers()} - self.packed)
        self.trained = _bytes(_trained(loss))
        self._known: dict[tuple[int, int, int, int, bool, bool], Marks] = {}

    @property
    def context_size(self) -> int:
        """How many processes compute a pack together."""
        if self.context is None:
            return 1
        return self.context.size

    def predict(
        self, pack: Pack, recomputed: int = 0, accumulate: bool = True, gathered: bool = False
    ) -> Memory:
        """Memory of a step with packs like `pack`, the first `recomputed` layers recomputed.

        `accumulate`: a step has more than one pack, so that gradients exist during the forward
        pass. `gathered`: weights in shards are gathered once a step. Raises what the model raises
        when its shapes depend on data (RuntimeError and its kind).
        """
        body, forward, *backward = self._marks(pack, False, accumulate)
        # How much a GPU's compiled layers keep was not measured.
        if self.compiled and not self.on_gpu:
            less = (1 - KEPT) * body
            body = body - less
            forward = forward - less
            backward = [mark - less for mark in backward]
        if recomputed and self.layers:
            every = self._marks(pack, True, accumulate)
            saved = recomputed / len(self.layers) * (body - every[0])
            # What the backward pass computes again lifts it up to the peak it has when all layers
            # are recomputed.
            body = body - saved
            forward = forward - saved
            backward = [max(backward) - saved, *every[2:]]
        shards = self.shards or 1
        trained = self.trained / shards
        # Gradients before the backward pass.
        earlier = trained if accumulate or self.shards else 0
        whole, reduced = self._buffers(gathered)
        at_forward = (earlier + forward + whole, earlier)
        at_backward = (earlier + max(backward) + whole + reduced, trained)
        peak, gradients = max(at_forward, at_backward)
        activations = min(body, peak - gradients)
        weights = self.weights // shards + int(NF4 * _count(self.packed))
        optimizer = 8 * _count(_trained(self.loss)) // shards
        allocator = 0
        if not self.on_gpu:
            allocator = min(HEAP, FIRST_USE + int(weights + optimizer + peak))
        return Memory(
            weights=weights,
            gradients=int(gradients),
            optimizer=optimizer,
            activations=int(activations),
            workspace=int(peak - gradients - activations),
            allocator=allocator,
            base=self.base,
        )

    def _buffers(self, gathered: bool) -> tuple[int, int]:
        """What `fully_shard` and 4 bits take beside: (weights made whole, gradients on their way),
        in bytes.

        One layer in use (all, where they stay `gathered`), the next one arriving and being copied
        out, and what belongs to no layer as a whole; in the backward pass the gradients of one
        layer in their own dtype, and float32 copies of two layers' in flight
        (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py and _fsdp_param_group.py).
        """
        size = self.precision.itemsize
        one = size * max((p.numel() for p in self.packed), default=0)
        if self.shards is None:
            return one, 0
        widest = 0
        trained = 0
        for layer in self.layers:
            widest = max(widest, _count({*layer.parameters()} - self.packed))
            trained = max(trained, _count(_trained(layer)))
        used = widest
        if gathered:
            used = _count({*self.layers.parameters()} - self.packed)
        inside = {id(p) for p in self.layers.parameters()}
        root = [p for p in self.loss.parameters() if id(p) not in inside]
        trained_root = [p for p in root if p.requires_grad]
        whole = one + size * (used + 2 * widest) + _bytes(root)
        reduced = (size + 8) * trained + _bytes(trained_root)
        return whole, reduced

    def _marks(self, pack: Pack, every: bool, accumulate: bool) -> Marks:
        """Marks of the whole depth, with no layer recomputed or all."""
        longest = int((pack.cu_seqlens[1:] - pack.cu_seqlens[:-1]).max())
        depth = len(self.layers)
        key = (self.context_size, len(pack.ids), longest, len(pack.index), every, accumulate)
        if key in self._known:
            return self._known[key]
        measure = partial(self._measure_step, pack, every=every, accumulate=accumulate)
        shapes = {(_count(layer.parameters()), _count(_trained(layer))) for layer in self.layers}
        if depth <= 3 or len(shapes) > 1:
            marks = measure(depth)
        else:
            two = measure(2)
            three = measure(3)
            marks = two + (depth - 2) * (three - two)
        self._known[key] = marks
        return marks

    def _measure_step(self, pack: Pack, depth: int, every: bool, accumulate: bool) -> Marks:
        """Run `depth` layers once, forward and backward, on fake tensors."""
        tensors = to_tensors(pack, torch.device("cpu"), self.context)
        with _quiet(type(self.loss.model).__name__), FakeTensorMode(allow_non_fake_inputs=True):
            loss, layers = self.shadow(depth)
            _choose_no_experts(loss.model)
            recompute(loss.model, depth if every else 0)
            earlier = _trained(loss) if accumulate else []
            if self.shards:
                earlier = _trained(layers)
            for p in _trained(loss):
                p.grad = None
            for p in earlier:
                p.grad = torch.empty_like(p)
            count = _Count()

            def entering_the_last_layer(_: nn.Module, args: tuple[Any, ...]) -> None:
                if args and args[0].requires_grad:
                    args[0].register_hook(lambda _: count.cut(2))

            def leaving_the_layers(*_: object) -> None:
                count.marks[0] = count.alive

            if depth:
                layers[-1].register_forward_pre_hook(entering_the_last_layer)
            loss.model.base_model.register_forward_hook(leaving_the_layers)
            attention.estimating_gpu = self.on_gpu
            is_half = self.precision != torch.float32
            try:
                with count:
                    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
                        value = loss(tensors)
                    count.cut(1)
                    value.backward()
                    count.cut(3)
            finally:
                attention.estimating_gpu = False
        return count.marks

    def shadow(self, depth: int) -> tuple[PackLoss, nn.ModuleList]:
        """A copy of the first `depth` layers and all around them, its parameters on the CPU and
        without contents.
        """
        inside = {id(p) for p in self.layers.parameters()} if self.shards else set()
        memo: dict[int, Any] = {id(layer): None for layer in list(self.layers)[depth:]}
        for tensor in (*self.loss.parameters(), *self.loss.buffers()):
            cast = tensor in self.packed or (id(tensor) in inside and tensor.is_floating_point())
            dtype = self.precision if cast else tensor.dtype
            fake = torch.empty(tensor.shape, dtype=dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            memo[id(tensor)] = fake
        shadow = copy.deepcopy(self.loss, memo)
        # NEFTune draws by the lengths of segments, which fake tensors do not tell; it is one more
        # hidden state.
        shadow.objective = shadow.objective.model_copy(update={"neftune_alpha": 0.0})
        layers = memo[id(self.layers)] if depth else nn.ModuleList()
        del layers[depth:]
        return shadow.train(), layers


def _choose_no_experts(model: nn.Module) -> None:
    """Let the experts that transformers computes by its grouped products compute without a choice.

    Which tokens an expert gets depends on data that fake tensors do not have. How much memory the
    experts take does not: every token goes to as many of them as the router chooses. Here all go
    through the weights of the first one; its gradient has the shape of all.
    """
    for module in model.modules():
        # The mark of transformers' `use_experts_implementation`.
        if "_is_expert_parallel" in vars(module):
            module.forward = partial(_experts_forward, module)


def _experts_forward(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """`hidden` [N, h], `chosen` and `weights` [N, K] -> [N, h]; as transformers'
    `grouped_mm_experts_experts_forward`.
    """
    tokens, each = chosen.shape
    flat = chosen.reshape(-1)
    order = flat.sort()[1]
    pairs = hidden[order // each]
    inner = experts.gate_up_proj if experts.has_gate else experts.up_proj
    out = _first_expert(experts, pairs, inner)
    if experts.has_bias:
        bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        out = out + bias[flat]
    out = experts._apply_gate(out) if experts.has_gate else experts.act_fn(out)
    out = _first_expert(experts, out, experts.down_proj)
    if experts.has_bias:
        out = out + experts.down_proj_bias[flat]
    weighted = (out * weights.reshape(-1)[order, None])[order]
    return weighted.view(tokens, each, -1).sum(1).to(hidden.dtype)


def _first_expert(experts: Any, rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows times the matrix of the first expert, of `matrices` [E, out, in], or [E, in, out] where
    transposed.
    """
    if torch.is_autocast_enabled("cpu"):  # the grouped product casts, and keeps, all of them
        matrices = matrices.to(torch.get_autocast_dtype("cpu"))
    first = matrices[0].to(rows.dtype)
    return rows @ (first if experts.is_transposed else first.t())


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep PyTorch's own report of an operation that fake tensors cannot do off the terminal; say
    it in words.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise RuntimeError(f"sizes inside {name} depend on the data ({error.func})") from error
    finally:
        log.disabled = before


class _Count(TorchDispatchMode):
    """Bytes of the tensors made inside and still alive, and their peak; each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.marks = np.zeros(4)
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Weights, earlier gradients: their views are not new.
        self._note((args, kwargs), made_here=False)
        out = func(*args, **(kwargs or {}))
        self._note(out, made_here=True)
        return out

    def _note(self, tensors: Any, made_here: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages:
                continue
            size = storage.nbytes() if made_here else 0
            gone = partial(self._freed, key, size)
            self._storages[key] = weakref.ref(storage, gone)
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def cut(self, mark: int) -> None:
        """Note the peak so far, and begin anew."""
        self.marks[mark] = self.peak
        self.peak = self.alive

    def _freed(self, key: int, size: int, _: object) -> None:
        del self._storages[key]
        self.alive -= size


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
