"""Packs in which shared prefixes stand once say exactly what their examples say."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftx.data import prefixes
from sftx.data.pack import build_pack
from sftx.data.plan import Plan
from sftx.data.prefixes import build_shared_pack, segments_of, shared_order
from sftx.data.shared_packs import Members, saving_of, shared_packs
from sftx.settings.schema import Batch
from sftx.types import Example, Pack

Said = Counter[tuple[tuple[int, ...], int]]
"""(the tokens before a target, the target) -> its weight."""


def tree_of_examples(seed: int, longest_piece: int = 40) -> list[Example]:
    """Examples of a random tree: depth up to 5, up to 8 branches, empty pieces and pieces of one
    token, examples that end inside others and equal ones, weights inside of prefixes; in no order.
    """
    random = np.random.RandomState(seed)
    found: list[Example] = []

    def grow(tokens: list[int], weights: list[float], depth: int) -> None:
        for _ in range(random.randint(1, 9 if depth < 2 else 3)):
            length = random.choice([0, 1, 2, 5, 17, longest_piece])
            piece = random.randint(0, 3, length).tolist()
            more = random.choice([0.0, 0.0, 0.25, 1.0, 2.0], length).tolist()
            ids, of_all = tokens + piece, weights + more
            if len(ids) >= 2 and random.rand() < (0.9 if depth == 4 else 0.3):
                # The weights of equal tokens may differ from one example to another.
                own = np.array(of_all, np.float32) * random.choice([1, 1, 0.5])
                found.append(Example(np.array(ids, np.int32), own))
            if depth < 4 and len(found) < 60:
                grow(ids, of_all, depth + 1)

    grow([], [], 0)
    found = found or [Example(np.arange(3, dtype=np.int32), np.ones(3, np.float32))]
    return [found[i] for i in random.permutation(len(found))]


def said_by_examples(examples: list[Example]) -> Said:
    said: Said = Counter()
    for example in examples:
        ids = example.ids.tolist()
        for t, weight in enumerate(example.weights.tolist()):
            if weight:
                said[tuple(ids[:t]), ids[t]] += weight
    return said


def chains_of(pack: Pack) -> list[list[int]]:
    """For every segment, the tokens of its chain of ancestors and its own."""
    parents = [-1] * (len(pack.cu_seqlens) - 1) if pack.parent is None else pack.parent.tolist()
    chains: list[list[int]] = []
    for number, (parent, (a, b)) in enumerate(
        zip(parents, pairwise(pack.cu_seqlens.tolist()), strict=True)
    ):
        assert -1 <= parent < number
        before = chains[parent] if parent >= 0 else []
        chains.append(before + pack.ids[a:b].tolist())
        assert pack.positions[a:b].tolist() == list(range(len(before), len(chains[-1])))
        assert b > a
    return chains


def said_by_pack(pack: Pack) -> Said:
    """What a pack says, read by its contract: targets grouped by the segment of their label."""
    chains, bounds = chains_of(pack), pack.cu_seqlens.tolist()
    parents = None if pack.parent is None else pack.parent.tolist()
    said: Said = Counter()
    segment = 0
    for at, label, weight in zip(
        pack.index.tolist(), pack.label.tolist(), pack.weight.tolist(), strict=True
    ):
        while not predicts(at, label, segment, pack, parents):
            segment += 1  # never back: they are in the order of segments
        a, b = bounds[segment : segment + 2]
        before = len(chains[segment]) - (b - a)
        place = before + at + 1 - a if a <= at < b - 1 else before
        assert chains[segment][place] == label
        key = tuple(chains[segment][:place]), label
        assert key not in said, "a target stands once"
        said[key] = weight
    return said


def predicts(at: int, label: int, segment: int, pack: Pack, parents: list[int] | None) -> bool:
    """Whether the target at `at` has its label in `segment`."""
    a, b = pack.cu_seqlens[segment : segment + 2].tolist()
    if a <= at < b - 1:
        return bool(pack.ids[at + 1] == label)
    parent = -1 if parents is None else parents[segment]
    return parent >= 0 and at == pack.cu_seqlens[parent + 1] - 1 and int(pack.ids[a]) == label


def check_exact(pack: Pack, examples: list[Example]) -> None:
    assert sorted(said_by_pack(pack).items()) == sorted(said_by_examples(examples).items())
    ends = Counter(
        tuple(chain[:stop]) for chain in chains_of(pack) for stop in range(len(chain) + 1)
    )
    assert all(ends[tuple(example.ids.tolist())] for example in examples)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_a_pack_says_what_its_examples_say(seed: int, everything: bool) -> None:
    """`everything`: all that examples have in common is shared, down to single tokens."""
    examples = tree_of_examples(seed)
    if everything:
        order = sorted(range(len(examples)), key=lambda i: examples[i].ids.tolist())
        common = [0]
        for a, b in pairwise(order):
            equal = zip(examples[a].ids, examples[b].ids, strict=False)
            differs = [k for k, (x, y) in enumerate(equal) if x != y]
            shortest = min(len(examples[a].ids), len(examples[b].ids))
            common.append(differs[0] if differs else shortest)
    else:
        found = shared_order([example.ids for example in examples])
        order, common = list(range(len(examples))), [0] * len(examples)
        if found is not None:
            order, common = found.order.tolist(), found.shared.tolist()
    assert sorted(order) == list(range(len(examples)))
    inside = [examples[i] for i in order]
    pack = build_shared_pack(inside, tuple(order), common)
    assert pack.examples == tuple(order)
    assert len(pack.ids) == sum(len(example.ids) for example in inside) - sum(common)
    if everything:  # what is left is the trie: one token for every different beginning
        trie = {tuple(e.ids[: t + 1].tolist()) for e in examples for t in range(len(e.ids))}
        assert len(pack.ids) == len(trie)
    # A pack without sharing may say a target twice.
    assert pack.parent is not None or not everything or not any(common)
    if any(common) and everything:
        check_exact(pack, examples)
    assert pack.weight.sum(dtype=np.float64) == sum(
        example.weights.sum(dtype=np.float64) for example in examples
    )


PROMPT = np.arange(100, 140, dtype=np.int32)


def branch(*tail: int, weight: float = 1.0, prompt: np.ndarray = PROMPT) -> Example:
    ids = np.concatenate([prompt, np.array(tail, np.int32)])
    weights = np.where(np.arange(len(ids)) < len(prompt), 0, weight)
    return Example(ids.astype(np.int32), weights.astype(np.float32))


def test_a_prompt_stands_once_and_its_last_token_predicts_every_answer() -> None:
    pack = build_shared_pack([branch(1, 2), branch(3, weight=0.5)], (4, 9), (0, 40))
    assert pack.ids.tolist() == [*PROMPT.tolist(), 1, 2, 3]
    assert pack.positions.tolist() == [*range(42), 40]
    assert pack.cu_seqlens.tolist() == [0, 40, 42, 43]
    assert pack.parent is not None
    assert pack.parent.tolist() == [-1, 0, 0]
    assert pack.index.tolist() == [39, 40, 39]
    assert pack.label.tolist() == [1, 2, 3]
    assert pack.weight.tolist() == [1, 1, 0.5]
    assert pack.examples == (4, 9)


def test_equal_examples_are_one_segment_without_a_parent() -> None:
    pack = build_shared_pack([branch(1, 2)] * 3, (0, 1, 2), (0, 42, 42))
    assert pack.parent is None
    assert pack.cu_seqlens.tolist() == [0, 42]
    assert pack.weight.tolist() == [3, 3]


def test_an_example_that_ends_where_others_fork_has_no_segment_of_its_own() -> None:
    segments = segments_of([40, 42, 44], [0, 40, 40])
    assert [tuple(s) for s in segments] == [(-1, 0, 3, 0, 40), (0, 1, 2, 40, 42), (0, 2, 3, 40, 44)]


def test_what_is_too_short_to_pay_is_not_shared() -> None:
    head = np.arange(prefixes.LEAST - 1, dtype=np.int32)
    assert shared_order([np.append(head, i).astype(np.int32) for i in (50, 60, 70)]) is None
    deep = [branch(1, 2, *range(20 * i, 20 * i + 9)).ids for i in range(3)]  # 42 in common
    deep += [branch(9, *range(8)).ids]  # 40
    found = shared_order(deep)
    assert found is not None
    assert sorted(found.shared.tolist()) == [0, 40, 40, 40]
    rare = [np.arange(1000 * i, 1000 * i + 900, dtype=np.int32) for i in range(9)]
    assert shared_order([*rare, branch(1).ids, branch(2).ids]) is None  # 40 of 8,182 tokens


def test_without_anything_shared_the_pack_is_the_plain_one() -> None:
    examples = [branch(1), branch(2)]
    shared, plain = build_shared_pack(examples, (0, 1), ()), build_pack(examples, (0, 1))
    for name in ("ids", "positions", "cu_seqlens", "index", "label", "weight"):
        assert getattr(shared, name).tolist() == getattr(plain, name).tolist()
    assert shared.parent is None
    assert len(build_shared_pack([], (), ()).ids) == 1


# --- a step over packs and ranks ------------------------------------------------------------------


def plan_of_examples(examples: list[Example], shuffle: bool = True) -> Plan:
    lengths = np.array([len(e.ids) for e in examples], np.int32)
    weights = np.array([e.weights.sum(dtype=np.float64) for e in examples])
    batch = Batch(examples_per_step=len(examples), epochs=1, shuffle=shuffle)
    return Plan(lengths, weights, batch, 0)


def computed(examples: list[Example], members: Members) -> int:
    return sum(len(examples[i].ids) for i in members.examples) - sum(members.shared)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 30, 100, 4096]), st.sampled_from([1, 2, 4]))
def test_packs_of_a_step_say_what_its_examples_say(seed: int, size: int, world_size: int) -> None:
    examples = tree_of_examples(seed)
    plan = plan_of_examples(examples)
    ranks = shared_packs(plan, 0, size, world_size, dict(enumerate(examples)))
    assert len({len(bins) for bins in ranks}) == 1
    placed = [i for bins in ranks for members in bins for i in members.examples]
    assert sorted(placed) == list(range(len(examples)))
    said: Said = Counter()
    longest = max(len(e.ids) for e in examples)
    for members in (members for bins in ranks for members in bins):
        inside = [examples[i] for i in members.examples]
        pack = build_shared_pack(inside, members.examples, members.shared)
        if not members.examples:
            assert not len(pack.index)
            continue
        assert len(pack.ids) == computed(examples, members) <= max(size, longest)
        if members.shared:
            here = Counter({k: v for k, v in said_by_pack_with_repeats(pack).items()})
        else:
            here = said_by_examples(inside)
            assert pack.weight.sum(dtype=np.float64) == sum(here.values())
        said.update(here)
    assert said == said_by_examples(examples)
    assert float(sum(said.values())) == plan.total_weight(0)


def said_by_pack_with_repeats(pack: Pack) -> Said:
    """As `said_by_pack`, where trees too short to be merged may say a target again."""
    chains = chains_of(pack)
    bounds, parents = pack.cu_seqlens.tolist(), pack.parent
    said: Said = Counter()
    last_of = (
        {}
        if parents is None
        else {s: bounds[p + 1] - 1 for s, p in enumerate(parents.tolist()) if p >= 0}
    )
    targets = list(zip(pack.index.tolist(), pack.label.tolist(), pack.weight.tolist(), strict=True))
    for segment, (a, b) in enumerate(pairwise(bounds)):
        before = len(chains[segment]) - (b - a)
        at_first = last_of.get(segment, -1)
        for t in range(a, b):
            at = at_first if t == a else t - 1
            if targets and targets[0][0] == at and targets[0][1] == int(pack.ids[t]):
                chain = chains[segment]
                said[tuple(chain[: before + t - a]), targets[0][1]] += targets[0][2]
                targets.pop(0)
    assert not targets
    return said


def many_answers(prompts: int, answers: int, seed: int = 0) -> list[Example]:
    random = np.random.RandomState(seed)
    found = []
    for _ in range(prompts):
        prompt = random.randint(10, 10_000, 120).astype(np.int32)
        found += [
            branch(*random.randint(10, 10_000, random.randint(20, 90)).tolist(), prompt=prompt)
            for _ in range(answers)
        ]
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_trees_are_not_torn_apart_needlessly(world_size: int) -> None:
    """32 prompts with 8 answers each: each prompt is computed once, on ranks of equal work."""
    examples = many_answers(32, 8)
    plan = plan_of_examples(examples)
    ranks = shared_packs(plan, 0, 2048, world_size, dict(enumerate(examples)))
    loads = [sum(computed(examples, members) for members in bins) for bins in ranks]
    whole = sum(len(e.ids) for e in examples) - 32 * 7 * 120
    assert sum(loads) <= 1.02 * whole
    assert max(loads) <= 1.05 * whole / world_size
    assert all(computed(examples, members) <= 2048 for bins in ranks for members in bins)


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_large_tree_is_dealt_over_ranks(world_size: int) -> None:
    examples = many_answers(1, 64)
    plan = plan_of_examples(examples)
    ranks = shared_packs(plan, 0, 8192, world_size, dict(enumerate(examples)))
    loads = [sum(computed(examples, members) for members in bins) for bins in ranks]
    assert sum(loads) == sum(len(e.ids) for e in examples) - (64 - world_size) * 120
    assert max(loads) <= 1.05 * sum(loads) / world_size


def test_a_tree_larger_than_a_pack_has_its_prefix_once_in_each() -> None:
    examples = many_answers(1, 64)
    (bins,) = shared_packs(plan_of_examples(examples), 0, 512, 1, dict(enumerate(examples)))
    for members in bins:
        pack = build_shared_pack([examples[i] for i in members.examples], (), members.shared)
        assert pack.parent is not None
        assert pack.parent.tolist() == [-1] + [0] * (len(pack.parent) - 1)
        assert len(pack.ids) <= 512


@pytest.mark.parametrize(("answers", "size"), [(2, 512), (64, 2048)])
def test_packs_are_as_large_as_cutting_trees_costs_much(answers: int, size: int) -> None:
    """Of two answers a tree has about 230 tokens, of 64 about 3,600."""
    examples = many_answers(4, answers)
    plan = plan_of_examples(examples)
    corpus: Any = SimpleNamespace(example=examples.__getitem__)
    saving = saving_of(plan, corpus)
    assert saving.saved_tokens == 4 * (answers - 1) * 120
    assert saving.pack_size == size
    cut = saving_of(plan, corpus, 1)
    (bins,) = shared_packs(plan, 0, 1, 1, dict(enumerate(examples)))
    assert cut.saved_tokens <= sum(sum(members.shared) for members in bins) < saving.saved_tokens


def test_ranks_are_dealt_the_work_that_is_really_done() -> None:
    """What a prefix costs is taken off, by the cost of its tokens, targets and square."""
    examples = many_answers(8, 4)
    plan = plan_of_examples(examples)
    lengths = plan.lengths.astype(np.float64)
    plan.cost = lambda tokens, targets, squares: 3 * tokens + 50 * targets + squares
    plan.work = plan.cost(lengths, np.array([e.targets for e in examples]), lengths**2)
    ranks = shared_packs(plan, 0, 4096, 2, dict(enumerate(examples)))
    loads = []
    for bins in ranks:
        load = 0.0
        for members in bins:
            pack = build_shared_pack([examples[i] for i in members.examples], (), members.shared)
            load += 3 * len(pack.ids) + 50 * len(pack.index)
            load += sum(
                (int(pack.positions[b - 1]) + 1) ** 2 - int(pack.positions[a]) ** 2
                for a, b in pairwise(pack.cu_seqlens.tolist())
            )
        loads.append(load)
    assert max(loads) <= 1.05 * sum(loads) / 2
    alone = sum(plan.work) - 8 * 3 * (3 * 120 + 120**2)
    assert sum(loads) == alone


def test_a_step_without_sharing_has_the_packs_of_the_plan() -> None:
    random = np.random.RandomState(0)
    examples = [
        Example(random.randint(0, 9999, n).astype(np.int32), np.ones(n, np.float32))
        for n in random.randint(20, 90, 40)
    ]
    plan = plan_of_examples(examples)
    for world_size in (1, 2):
        shared = shared_packs(plan, 0, 256, world_size, dict(enumerate(examples)))
        plain = plan.packs(0, 256, world_size)
        assert [[members.examples for members in bins] for bins in shared] == plain
        assert not any(members.shared for bins in shared for members in bins)
