"""A tree of examples that begin alike, in a few lines: a piece that is computed once, its branches
indented under it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sftx.data.prefixes import Segment, segments_of
from sftx.data.shared_packs import Members

LINES = 10
"""Lines of a tree that are shown."""


def largest_tree(packs: Sequence[Members], lengths: NDArray[np.integer]) -> list[str]:
    """The tree of these packs that saves most; nothing where no prefix is shared. `lengths`: tokens
    of all examples.
    """
    best: list[Segment] = []
    most = 0
    for members in packs:
        if not any(members.shared):
            continue
        sizes = [int(lengths[i]) for i in members.examples]
        for tree in _trees(segments_of(sizes, members.shared)):
            saved = sum((s.last - s.first - 1) * (s.stop - s.start) for s in tree)
            if saved > most:
                best = tree
                most = saved
    if not best:
        return []
    return ["the largest tree of step 1:", *_lines(best)]


def _trees(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments in order, cut where one begins anew."""
    trees: list[list[Segment]] = []
    for segment in segments:
        if segment.parent < 0:
            trees.append([])
        trees[-1].append(segment)
    return trees


def _lines(tree: Sequence[Segment]) -> list[str]:
    """A line of each piece that several examples have, and one of what follows it in single ones."""
    lines: list[str] = []
    above: list[Segment] = []
    tails: list[int] = []  # tokens that examples have alone, behind the same piece
    indent = ""
    for segment in tree:
        while above and above[-1].last <= segment.first:
            above.pop()
            lines += _tail_lines(indent, tails)
            tails = []
        indent = "    " * len(above)
        tokens = segment.stop - segment.start
        count = segment.last - segment.first
        if count == 1:
            tails.append(tokens)
            continue
        lines += _tail_lines(indent, tails)
        tails = []
        lines.append(f"{indent}{tokens:,} tokens, once for {count} examples")
        above.append(segment)
    lines += _tail_lines(indent, tails)
    hidden = len(lines) - LINES
    if hidden > 0:
        lines = [*lines[:LINES], f"    and {hidden} more pieces"]
    return lines


def _tail_lines(indent: str, tails: Sequence[int]) -> list[str]:
    """A line of single examples; nothing of none."""
    if not tails:
        return []
    fewest, most = min(tails), max(tails)
    tokens = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    if len(tails) == 1:
        return [f"{indent}then {tokens} tokens in 1 example"]
    return [f"{indent}then {tokens} tokens in each of {len(tails)} examples"]
