"""Packs of segments that share prefixes, made naively from random trees, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from sftx.types import Example, Pack


@dataclass(frozen=True)
class Tree:
    """A pack, and the examples that it holds: paths from a root to where they end."""

    pack: Pack
    examples: list[Example]


def tree_of(
    parents: list[int],
    lengths: list[int],
    ends: list[int],
    seed: int = 0,
    vocab_size: int = 264,
    share: float = 0.5,
) -> Tree:
    """Segments of random tokens; `ends[i]` = the segment in which example i ends. About `share` of the
    tokens of every example are targets, of random weight.
    """
    rng = np.random.RandomState(seed)
    tokens = [rng.randint(3, vocab_size, n).astype(np.int32) for n in lengths]
    summed = [np.zeros(n) for n in lengths]
    examples = []
    for end in ends:
        path = path_of(parents, end)
        ids = np.concatenate([tokens[s] for s in path])
        weights = ((rng.rand(len(ids)) < share) * rng.rand(len(ids)) * 2).astype(np.float32)
        weights[-1:] = 1.0
        weights[:1] = 0.0
        examples.append(Example(ids, weights))
        at = 0
        for s in path:
            summed[s] += weights[at : at + lengths[s]].astype(float)
            at += lengths[s]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions, index, label, weight = [], [], [], []
    for s, length in enumerate(lengths):
        path = [p for p in path_of(parents, s)[:-1] if lengths[p]]
        before = sum(lengths[p] for p in path)
        positions += range(before, before + length)
        for t in np.flatnonzero(summed[s]).tolist():
            inside = int(starts[s]) + t - 1
            index.append(inside if t else int(starts[path[-1] + 1]) - 1)
            label.append(int(tokens[s][t]))
            weight.append(summed[s][t])
    pack = Pack(
        ids=np.concatenate(tokens),
        positions=np.array(positions, np.int32),
        cu_seqlens=starts.astype(np.int32),
        index=np.array(index, np.int32),
        label=np.array(label, np.int32),
        weight=np.array(weight, np.float32),
        parent=np.array(parents, np.int32),
    )
    return Tree(pack, examples)


def path_of(parents: list[int], segment: int) -> list[int]:
    """The segments from the root to `segment`."""
    path = [segment]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@st.composite
def trees(draw: st.DrawFn, longest: int = 12) -> Tree:
    """Up to 5 deep, up to 8 branches each; leaves may be empty, examples may end anywhere, twice in
    one place, and inside another.
    """
    parents: list[int] = []
    depth: list[int] = []
    for number in range(draw(st.integers(1, 14))):
        open_ones = [i for i in range(number) if depth[i] < 5 and parents.count(i) < 8]
        parents.append(draw(st.sampled_from([-1, *open_ones])))
        depth.append(depth[parents[-1]] + 1 if parents[-1] >= 0 else 0)
    lengths = []
    for number in range(len(parents)):
        may_be_empty = number not in parents and parents[number] >= 0
        lengths.append(draw(st.integers(0 if may_be_empty else 1, longest)))
    leaves = [i for i in range(len(parents)) if i not in parents]
    ends = leaves + draw(st.lists(st.sampled_from(range(len(parents))), max_size=4))
    return tree_of(parents, lengths, ends, draw(st.integers(0, 1000)))


BUSHY = tree_of(
    parents=[-1, 0, 1, 1, 0, 0, -1, 6, -1, 3],
    lengths=[60, 9, 1, 37, 5, 33, 8, 20, 12, 4],
    ends=[2, 3, 3, 4, 5, 7, 8, 9, 0],
)
"""Two trees and an example alone: an example that ends in a prefix, two that are identical, a branch
of one token.
"""
