"""Whether segments may share prefixes: tried on a small stand-in, in float64, and on the model itself.

What segments give behind shared prefixes must be what whole sequences give in a pack, which
`isolation` has found to be exact: logits, loss and gradients. A model that does something of its own
with segments (a state, a convolution, positions that it counts itself), or that drops attention
while it trains, does not pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftx.model.checks.isolation import EQUAL, matching_transform
from sftx.model.checks.probe import LONGEST, segment_lengths
from sftx.model.checks.stand_in import FOREIGN_ERRORS, stand_in, vocabulary
from sftx.model.pack_loss import PackLoss, Paths, TensorPack, to_tensors
from sftx.model.prefix_attention import shared_segments
from sftx.types import Float32, Int32, Pack

Int64 = NDArray[np.int64]
CPU = torch.device("cpu")
PARENTS = (-1, 0, 0, 2, 0, -1)
ORDERS = ((0, 1, 2, 3, 4, 5), (5, 0, 4, 2, 3, 1))
"""In which the segments are tried: parents come before their children."""
KERNELS_EQUAL = 3e-2
"""Relative difference (L2) that rounding to half precision explains."""


@torch.autocast("cpu", enabled=False)
@torch.enable_grad()
def shares_prefixes(loss: PackLoss, longest: int) -> bool:
    """Whether a stand-in for the model of `loss` is exact with shared prefixes, in sequences up to
    `longest` tokens. What cannot be tried is not.
    """
    long = max(segment_lengths(loss.model.config.to_dict(), longest))
    if not 8 <= long <= LONGEST:
        return False
    small = stand_in(loss.model)
    if small is None:
        return False
    tokens, weights = _random_segments(long, vocabulary(small))
    pairs = [_both_ways(tokens, weights, order) for order in ORDERS]
    shared, separate = pairs[0]
    ours = PackLoss(small).eval()
    try:
        with torch.no_grad():
            transform = matching_transform(ours, separate, EQUAL)
        ours.take(Paths(transform=transform, shares_prefixes=True))
        if not all(_same(ours, *pair) for pair in pairs):
            return False
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ours.train().own_logits(shared)
    except FOREIGN_ERRORS:  # the model's forward does not take such segments
        return False
    return True


def _same(loss: PackLoss, shared: TensorPack, separate: TensorPack) -> bool:
    """Whether two packs give the same logits, loss and gradient of every weight."""
    with torch.no_grad():
        logits = loss.own_logits(shared)
        wanted = loss.own_logits(separate)
    if logits.shape != wanted.shape:
        return False
    difference = (logits - wanted).abs().max()
    if float(difference) > EQUAL * float(wanted.abs().max()):
        return False
    value, gradients = _step(loss, shared)
    same, others = _step(loss, separate)
    if abs(value - same) > EQUAL * abs(same):
        return False
    norms = [float(gradient.norm()) for gradient in others]
    least = 1e-3 * max(norms)  # below it a gradient is rounding
    for ours, theirs, norm in zip(gradients, others, norms, strict=True):
        if float((ours - theirs).norm()) > EQUAL * max(norm, least):
            return False
    return True


def _step(loss: PackLoss, pack: TensorPack) -> tuple[float, list[Tensor]]:
    """The loss of a pack, and the gradient of every weight."""
    loss.zero_grad()
    value = loss(pack)
    value.backward()
    found: list[Tensor] = []
    for parameter in loss.parameters():
        gradient = parameter.grad
        found.append(torch.zeros_like(parameter) if gradient is None else gradient)
    return float(value.detach()), found


def apart(loss: PackLoss, probe: TensorPack) -> float:
    """How far the model's own logits move, as a mean over rows of the largest difference, where the
    first segment of `probe` is a prefix of the others instead of standing before each. Infinite where
    they cannot be had.
    """
    bounds = probe.cu_seqlens_cpu.tolist()
    ids = probe.ids.cpu().numpy()
    segments = [ids[a:b].astype(np.int32) for a, b in itertools.pairwise(bounds)]
    root, *branches = segments
    nothing = np.zeros(len(root), np.float32)
    weights = [nothing]
    parents = [-1]
    whole: list[Int32] = []
    whole_weights: list[Float32] = []
    for branch in branches:
        ones = np.ones(len(branch), np.float32)
        weights.append(ones)
        parents.append(0)
        whole.append(np.concatenate([root, branch]))
        whole_weights.append(np.concatenate([nothing, ones]))
    shared = tree_pack(segments, weights, parents)
    separate = tree_pack(whole, whole_weights, [-1] * len(branches))
    device = probe.ids.device
    try:
        ours = loss.own_logits(to_tensors(shared, device))
        theirs = loss.own_logits(to_tensors(separate, device))
    except FOREIGN_ERRORS:
        return float("inf")
    difference = ours.float() - theirs.float()
    return float(difference.abs().amax(-1).mean())


@torch.enable_grad()
def kernels_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention, merged, gives the output and the gradients of merged blocks."""
    parents = [-1, 0, 0, 2, -1]
    lengths = [70, 33, 1, 150, 9]
    tokens = [np.zeros(length, np.int32) for length in lengths]
    weights = [np.zeros(length, np.float32) for length in lengths]
    pack = to_tensors(tree_pack(tokens, weights, parents), device)
    index = [pack.positions, *pack.prefixes]
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, sum(lengths), 64)
    drawn = [torch.randn(shape, generator=generator) for _ in range(3)]
    found: list[list[Tensor]] = []
    for flash in (True, False):
        given = [x.to(device, dtype).requires_grad_() for x in drawn]
        try:
            q, k, v = given
            out = shared_segments(q, k, v, None, index, 0.125, 0, 0.0, flash)
            loss = out.float().square().sum()
            gradients = torch.autograd.grad(loss, given)
        except FOREIGN_ERRORS:  # this torch has other kernels
            return False
        found.append([out.detach(), *gradients])
    for ours, theirs in zip(*found, strict=True):
        difference = (ours - theirs).norm()
        if float(difference) > KERNELS_EQUAL * float(theirs.norm()):
            return False
    return True


def tree_pack(tokens: Sequence[Int32], weights: Sequence[Float32], parents: Sequence[int]) -> Pack:
    """Segments as a pack: the tokens of each, their weights as targets, and their parents."""
    lengths = [len(segment) for segment in tokens]
    starts = np.append(0, np.cumsum(lengths))
    positions: list[Int64] = []
    index: list[Int64] = []
    for segment, parent in enumerate(parents):
        before = 0
        if parent >= 0:
            before = positions[parent][-1] + 1
        positions.append(before + np.arange(lengths[segment]))
        targets = np.flatnonzero(weights[segment])
        places = starts[segment] + targets - 1
        if weights[segment][0]:  # the last token of the parent predicts it
            places[0] = starts[parent + 1] - 1
        index.append(places)
    ids = np.concatenate(tokens)
    weight = np.concatenate(weights)
    is_target = weight != 0
    return Pack(
        ids=ids.astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        cu_seqlens=starts.astype(np.int32),
        index=np.concatenate(index).astype(np.int32),
        label=ids[is_target].astype(np.int32),
        weight=weight[is_target],
        parent=np.array(parents, np.int32),
    )


def _random_segments(long: int, ids: int) -> tuple[list[Int32], list[Float32]]:
    """Tokens and weights of the segments; the first two together are a sequence of `long` tokens."""
    random = np.random.RandomState(0)
    room = long - long // 2
    short = min(7, room // 2)
    rest = min(23, room - short)
    lengths = [long // 2, room, short, rest, 1, 5]
    first = min(3, ids - 1)
    drawn = [random.randint(first, ids, length) for length in lengths]
    tokens = [segment.astype(np.int32) for segment in drawn]
    weights: list[Float32] = []
    for length, parent in zip(lengths, PARENTS, strict=True):
        some = random.rand(length)
        is_context = random.rand(length) >= 0.5
        some[is_context] = 0.0
        some[-1] = 1.0
        some[0] = 0.0 if parent < 0 else 0.5
        weights.append(some.astype(np.float32))
    return tokens, weights


def _both_ways(
    tokens: list[Int32], weights: list[Float32], order: Sequence[int]
) -> tuple[TensorPack, TensorPack]:
    """The segments in this order, behind shared prefixes, and each as a whole sequence of its own,
    the weights of its ancestors 0.
    """
    parents: list[int] = []
    whole: list[Int32] = []
    whole_weights: list[Float32] = []
    for segment in order:
        above = PARENTS[segment]
        parents.append(order.index(above) if above >= 0 else -1)
        ids = tokens[segment]
        while above >= 0:
            ids = np.concatenate([tokens[above], ids])
            above = PARENTS[above]
        before = len(ids) - len(tokens[segment])
        nothing = np.zeros(before, np.float32)
        whole.append(ids)
        whole_weights.append(np.concatenate([nothing, weights[segment]]))
    own = [tokens[segment] for segment in order]
    own_weights = [weights[segment] for segment in order]
    shared = tree_pack(own, own_weights, parents)
    separate = tree_pack(whole, whole_weights, [-1] * len(order))
    return to_tensors(shared, CPU), to_tensors(separate, CPU)
