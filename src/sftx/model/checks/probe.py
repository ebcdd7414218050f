"""How long the examples must be with which a model is tried: longer than every length that its
configuration names.

A window, a chunk, a budget of keys or the positions that a model was first trained on change
nothing up to that number of tokens. A probe that ends before it says nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sftx.model.checks.widths import WIDTHS
from sftx.model.pack_loss import TensorPack

SHORT = 256
"""Tokens of the longest segment where a configuration names no length: enough for what stands in
code alone.
"""
LONGEST = 32_768
"""Tokens of the longest segment that is tried; beyond, the attention of a probe would take minutes.
"""


def lengths_named(settings: Any, name: str = "") -> Iterator[int]:
    """Every whole number of a configuration, of its sections and lists too, that could be compared
    with a position.

    All are taken but those of `WIDTHS`, ids of tokens and numbers below 2: a number too many costs
    a longer probe only.
    """
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from lengths_named(value, str(key))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from lengths_named(value, name)
    elif _is_length(settings, name):
        yield int(settings)


def _is_length(value: object, name: str) -> bool:
    """Whether a value of that name could be compared with a position."""
    if name in WIDTHS or name.endswith("_token_id"):
        return False
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 2 <= value < 1e15 and value == int(value)


def reach(settings: dict[str, Any], longest: int) -> int:
    """Tokens up to which a model could change what it does in a segment of `longest` tokens: the
    largest of the named lengths below that, and of the products of two of them (so many blocks of
    so many tokens); 0 where there is none.
    """
    found = [number for number in set(lengths_named(settings)) if number < longest]
    products = [a * b for a in found for b in found if a * b < longest]
    return max((*found, *products), default=0)


def segment_lengths(settings: dict[str, Any], longest: int) -> list[int]:
    """Lengths of the segments of a probe, short and long ones in turn; `longest` = tokens of the
    longest example.

    Two segments are longer than every named length below `longest`.
    """
    inside = reach(settings, longest)
    longest = max(longest, 2)  # one token alone has no target
    long = min(longest, max(SHORT, inside + inside // 4))
    return [min(7, longest), long, min(23, longest), max(2, long - 3), min(40, longest)]


def places(settings: dict[str, Any], lengths: list[int], largest_pack: int) -> list[int]:
    """Which segments follow one another in a probe, by number; again and again until they reach
    beyond every named length below `largest_pack`, for what goes by the place in the pack.
    """
    inside = [number for number in lengths_named(settings) if number < largest_pack]
    needed = max(inside, default=0) + max(lengths)
    order = list(range(len(lengths)))
    tokens = sum(lengths)
    while tokens <= needed:
        order += range(len(lengths))
        tokens += sum(lengths)
    return order


def random_pack(lengths: list[int], vocabulary: int, seed: int = 0) -> TensorPack:
    """Segments of random tokens, about half of them targets of random weight; int64 ids below
    `vocabulary`.
    """
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens_cpu = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(cu_seqlens_cpu[-1])
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator)
    weights *= torch.rand(tokens, generator=generator) < 0.5
    ends = cu_seqlens_cpu[1:]
    weights[ends - 1] = 1.0
    weights[cu_seqlens_cpu[:-1]] = 0.0
    label_at = weights.nonzero()[:, 0]
    segment = torch.bucketize(label_at, ends, right=True)
    counts = segment.bincount(minlength=len(lengths))
    positions = [torch.arange(length) for length in lengths]
    return TensorPack(
        ids=ids,
        positions=torch.cat(positions),
        cu_seqlens_cpu=cu_seqlens_cpu.to(torch.int32),
        index=label_at - 1,
        label=ids[label_at],
        weight=weights[label_at],
        longest=max(lengths),
        counts=tuple(counts.tolist()),
    )


def part(pack: TensorPack, number: int) -> TensorPack:
    """Segment `number` of a pack, as a pack."""
    return in_order(pack, [number])


def in_order(pack: TensorPack, order: list[int]) -> TensorPack:
    """A pack of segments of `pack`, by their numbers."""
    parts = list(pack.parts())
    ids = []
    positions = []
    index = []
    label = []
    weight = []
    cu_seqlens = [0]
    for number in order:
        a, b, at, mine = parts[number]
        ids.append(pack.ids[a:b])
        positions.append(pack.positions[a:b])
        index.append(at + cu_seqlens[-1])
        label.append(pack.label[mine])
        weight.append(pack.weight[mine])
        cu_seqlens.append(cu_seqlens[-1] + b - a)
    cu_seqlens_cpu = torch.tensor(cu_seqlens, dtype=torch.int32)
    return TensorPack(
        ids=torch.cat(ids),
        positions=torch.cat(positions),
        cu_seqlens_cpu=cu_seqlens_cpu,
        index=torch.cat(index),
        label=torch.cat(label),
        weight=torch.cat(weight),
        longest=int(cu_seqlens_cpu.diff().max()),
        counts=tuple(pack.counts[number] for number in order),
    )
