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
from torch import Tensor

from sftx.model.checks.isolation import EQUAL, matching_transform
from sftx.model.checks.probe import LONGEST, segment_lengths
from sftx.model.checks.stand_in import FOREIGN_ERRORS, stand_in, vocabulary
from sftx.model.pack_loss import PackLoss, Paths, TensorPack, to_tensors
from sftx.model.prefix_attention import shared_segments
from sftx.types import Float32, Int32, Pack

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
    small = None if not 8 <= long <= LONGEST else stand_in(loss.model)
    if small is None:
        return False
    tokens, weights = _random_segments(long, vocabulary(small))
    pairs = [_both_ways(tokens, weights, order) for order in ORDERS]
    ours = PackLoss(small).eval()
    try:
        with torch.no_grad():
            transform = matching_transform(ours, pairs[0][1], EQUAL)
        ours.take(Paths(transform=transform, shares_prefixes=True))
        if not all(_same(ours, *pair) for pair in pairs):
            return False
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ours.train().own_logits(pairs[0][0])
    except FOREIGN_ERRORS:  # the model's forward does not take such segments
        return False
    return True


def _same(loss: PackLoss, shared: TensorPack, separate: TensorPack) -> bool:
    """Whether two packs give the same logits, loss and gradient of every weight."""
    with torch.no_grad():
        logits, wanted = loss.own_logits(shared), loss.own_logits(separate)
    if logits.shape != wanted.shape:
        return False
    if float((logits - wanted).abs().max()) > EQUAL * float(wanted.abs().max()):
        return False
    (value, gradients), (same, others) = _step(loss, shared), _step(loss, separate)
    least = 1e-3 * max(float(g.norm()) for g in others)  # what has no gradient but by rounding
    return abs(value - same) <= EQUAL * abs(same) and all(
        float((a - b).norm()) <= EQUAL * max(float(b.norm()), least)
        for a, b in zip(gradients, others, strict=True)
    )


def _step(loss: PackLoss, pack: TensorPack) -> tuple[float, list[Tensor]]:
    """The loss of a pack, and the gradient of every weight."""
    loss.zero_grad()
    value = loss(pack)
    value.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in loss.parameters()]
    return float(value.detach()), found


def apart(loss: PackLoss, probe: TensorPack) -> float:
    """How far the model's own logits move, as a mean over rows of the largest difference, where the
    first segment of `probe` is a prefix of the others instead of standing before each. Infinite where
    they cannot be had.
    """
    bounds = probe.cu_seqlens_cpu.tolist()
    ids = probe.ids.cpu().numpy().astype(np.int32)
    root, *branches = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    ones = [np.ones(len(branch), np.float32) for branch in branches]
    nothing = np.zeros(len(root), np.float32)
    shared = tree_pack([root, *branches], [nothing, *ones], [-1, *(0 for _ in branches)])
    whole = [np.concatenate([root, branch]) for branch in branches]
    of_branch = [np.concatenate([nothing, one]) for one in ones]
    separate = tree_pack(whole, of_branch, [-1] * len(branches))
    device = probe.ids.device
    try:
        ours, theirs = (loss.own_logits(to_tensors(x, device)) for x in (shared, separate))
    except FOREIGN_ERRORS:
        return float("inf")
    return float((ours.float() - theirs.float()).abs().amax(-1).mean())


@torch.enable_grad()
def kernels_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention, merged, gives the output and the gradients of merged blocks."""
    parents, lengths = [-1, 0, 0, 2, -1], [70, 33, 1, 150, 9]
    tokens = [np.zeros(length, np.int32) for length in lengths]
    pack = to_tensors(
        tree_pack(tokens, [np.zeros(len(x), np.float32) for x in tokens], parents), device
    )
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 4, sum(lengths), 64, generator=generator) for _ in range(3)]
    found: list[list[Tensor]] = []
    for flash in (True, False):
        given = [x.to(device, dtype).requires_grad_() for x in drawn]
        index = [pack.positions, *pack.prefixes]
        try:
            out = shared_segments(*given, None, index, 0.125, 0, 0.0, flash)
            found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), given)])
        except FOREIGN_ERRORS:  # this torch has other kernels
            return False
    pairs = zip(*found, strict=True)
    return all(float((a - b).norm()) <= KERNELS_EQUAL * float(b.norm()) for a, b in pairs)


def tree_pack(tokens: Sequence[Int32], weights: Sequence[Float32], parents: Sequence[int]) -> Pack:
    """Segments as a pack: the tokens of each, their weights as targets, and their parents."""
    starts = np.cumsum([0, *map(len, tokens)])
    positions, index = [], []
    for segment, parent in enumerate(parents):
        before = positions[parent][-1] + 1 if parent >= 0 else 0
        positions.append(before + np.arange(len(tokens[segment])))
        places = starts[segment] + np.flatnonzero(weights[segment]) - 1
        if weights[segment][0]:
            places[0] = starts[parent + 1] - 1
        index.append(places)
    chosen = [weight != 0 for weight in weights]
    return Pack(
        ids=np.concatenate(tokens).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        cu_seqlens=starts.astype(np.int32),
        index=np.concatenate(index).astype(np.int32),
        label=np.concatenate([x[at] for x, at in zip(tokens, chosen, strict=True)]),
        weight=np.concatenate([x[at] for x, at in zip(weights, chosen, strict=True)]),
        parent=np.array(parents, np.int32),
    )


def _random_segments(long: int, ids: int) -> tuple[list[Int32], list[Float32]]:
    """Tokens and weights of the segments; the first two together are a sequence of `long` tokens."""
    random = np.random.RandomState(0)
    room = long - long // 2
    short = min(7, room // 2)
    lengths = [long // 2, room, short, min(23, room - short), 1, 5]
    tokens = [random.randint(min(3, ids - 1), ids, length).astype(np.int32) for length in lengths]
    weights = []
    for segment, length in enumerate(lengths):
        some = (random.rand(length) * (random.rand(length) < 0.5)).astype(np.float32)
        some[-1] = 1.0
        some[0] = 0.0 if PARENTS[segment] < 0 else 0.5
        weights.append(some)
    return tokens, weights


def _both_ways(
    tokens: list[Int32], weights: list[Float32], order: Sequence[int]
) -> tuple[TensorPack, TensorPack]:
    """The segments in this order, behind shared prefixes, and each as a whole sequence of its own,
    the weights of its ancestors 0.
    """
    place = {-1: -1} | {segment: number for number, segment in enumerate(order)}
    parents = [place[PARENTS[segment]] for segment in order]
    whole, own = [], []
    for segment in order:
        above = PARENTS[segment]
        before = tokens[segment][:0]
        while above >= 0:
            before = np.concatenate([tokens[above], before])
            above = PARENTS[above]
        whole.append(np.concatenate([before, tokens[segment]]))
        own.append(np.concatenate([np.zeros(len(before), np.float32), weights[segment]]))
    chosen = [tokens[segment] for segment in order], [weights[segment] for segment in order]
    shared = tree_pack(*chosen, parents)
    return to_tensors(shared, CPU), to_tensors(tree_pack(whole, own, [-1] * len(order)), CPU)
