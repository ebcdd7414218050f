"""Packing and planning: every example exactly once, whatever the machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftx.data.pack import balanced, build_pack
from sftx.data.plan import Plan
from sftx.data.rotation import Rotation
from sftx.settings.schema import Batch
from sftx.types import Example, UserError

lengths_strategy = st.lists(st.integers(2, 50), min_size=1, max_size=40)


@given(lengths_strategy, st.integers(1, 120), st.integers(1, 5))
def test_every_example_is_placed_once_and_fits(
    lengths: list[int], capacity: int, world_size: int
) -> None:
    ranks = balanced(lengths, capacity, world_size)
    placed = sorted(i for bins in ranks for members in bins for i in members)
    assert placed == list(range(len(lengths)))
    assert len({len(bins) for bins in ranks}) == 1
    for bins in ranks:
        for members in bins:
            assert len(members) <= 1 or sum(lengths[i] for i in members) <= capacity


def test_a_pack_may_be_exactly_full() -> None:
    assert balanced([4, 6, 5, 5], 10) == [[(0, 1), (2, 3)]]


def test_ranks_with_several_packs_get_equal_sums() -> None:
    """Eight packs of one example, whose work is 8, 7, ... 1: each of two ranks gets half of it."""
    work = np.arange(8.0, 0.0, -1.0)
    ranks = balanced([1] * 8, 1, 2, work)
    assert [sum(work[i] for members in bins for i in members) for bins in ranks] == [18.0, 18.0]


def test_pack_shifts_labels_once_and_never_across_segments() -> None:
    a = Example(np.array([5, 6, 7], np.int32), np.array([9, 0, 2], np.float32))
    b = Example(np.array([8, 9], np.int32), np.array([9, 0.5], np.float32))
    pack = build_pack([a, b])
    assert pack.ids.tolist() == [5, 6, 7, 8, 9]
    assert pack.positions.tolist() == [0, 1, 2, 0, 1]
    assert pack.cu_seqlens.tolist() == [0, 3, 5]
    assert pack.index.tolist() == [
        1,
        3,
    ]  # token 7 is predicted from 6, token 9 from 8; first tokens from nothing
    assert pack.label.tolist() == [7, 9]
    assert pack.weight.tolist() == [2, 0.5]


def make_plan(count: int = 37, seed: int = 3, **batch: object) -> Plan:
    lengths = np.random.RandomState(0).randint(3, 60, count).astype(np.int32)
    return Plan(lengths, lengths / 2, Batch.model_validate(batch), seed)


@pytest.mark.parametrize(
    "batch", [{"examples_per_step": 5}, {"tokens_per_step": 100}, {"examples_per_step": 100}]
)
def test_an_epoch_is_every_example_once(batch: dict[str, int]) -> None:
    plan = make_plan(**batch, epochs=3)
    seen = np.concatenate([plan.examples(step) for step in range(plan.num_steps)])
    assert len(seen) == 3 * 37
    for epoch in range(3):
        assert sorted(seen[37 * epoch : 37 * (epoch + 1)]) == list(range(37))
    assert list(seen[:37]) != list(seen[37:74])
    assert sum(plan.total_weight(step) for step in range(plan.num_steps)) == pytest.approx(
        3 * plan.weights.sum()
    )


def test_a_step_does_not_depend_on_pack_size_or_processes() -> None:
    plan = make_plan(examples_per_step=8)
    for step in range(plan.num_steps):
        want = sorted(plan.examples(step).tolist())
        for tokens_per_pack in (1, 64, 4096):
            for world_size in (1, 2, 3):
                ranks = plan.packs(step, tokens_per_pack, world_size)
                assert sorted(i for bins in ranks for members in bins for i in members) == want


def test_ranks_get_equal_work_whatever_makes_it() -> None:
    random = np.random.RandomState(0)
    lengths = np.exp(random.normal(4.8, 0.8, 512)).astype(np.int32) + 2
    plan = Plan(lengths, lengths / 2, Batch(examples_per_step=128), 0)
    cost = lengths * (1.0 + random.rand(512))  # a third of it is not seen in the lengths
    for tokens_per_pack in (1 << 20, 3000):
        of_lengths = plan.packs(0, tokens_per_pack, 8)
        plan.work = cost
        of_cost = plan.packs(0, tokens_per_pack, 8)
        plan.work = lengths.astype(np.float64)
        sums = [
            [sum(cost[i] for m in bins for i in m) for bins in ranks]
            for ranks in (of_cost, of_lengths)
        ]
        ours, naive = (max(s) / (sum(s) / 8) - 1 for s in sums)
        assert ours < 0.02 < naive, (ours, naive)
        assert sorted(i for b in of_cost for m in b for i in m) == sorted(
            i for b in of_lengths for m in b for i in m
        )


def test_steps_and_tokens_per_step_are_kept() -> None:
    assert make_plan(steps=50, examples_per_step=4).num_steps == 50
    plan = make_plan(steps=50, tokens_per_step=100)
    assert plan.num_steps == 50
    assert all(plan.lengths[plan.examples(step)].sum() <= 100 for step in range(50))


def test_a_step_takes_as_many_tokens_as_fit() -> None:
    """`tokens_per_step` is used up where examples allow it; an example that is longer makes a step
    of its own.
    """
    lengths = np.array([40, 60, 30, 250, 50, 50, 50], np.int32)
    plan = Plan(lengths, lengths / 2, Batch(tokens_per_step=100, epochs=1, shuffle=False), 0)
    assert [plan.examples(step).tolist() for step in range(plan.num_steps)] == [
        [0, 1],
        [2],
        [3],
        [4, 5],
        [6],
    ]
    assert [plan.epoch(step) for step in range(plan.num_steps)] == [2 / 7, 3 / 7, 4 / 7, 6 / 7, 1.0]


def test_a_step_may_be_larger_than_the_data() -> None:
    """It goes on with the next epoch, as a step of so many examples does."""
    lengths = np.array([10, 20, 30, 40], np.int32)
    for room, sizes in ((150, [130, 130, 150]), (250, [230, 230, 250]), (1000, [1000] * 3)):
        plan = Plan(lengths, lengths / 2, Batch(tokens_per_step=room, steps=3, shuffle=False), 0)
        assert [plan.lengths[plan.examples(step)].sum() for step in range(3)] == sizes
    plan = Plan(lengths, lengths / 2, Batch(tokens_per_step=250, epochs=2.5, shuffle=False), 0)
    assert [plan.examples(step).tolist() for step in range(plan.num_steps)] == [
        [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    ]
    groups = np.array([0, 1, 1, 1])
    batch = Batch(examples_per_step=9, steps=2, shuffle=False, group_by="row")
    plan = Plan(lengths, lengths / 2, batch, 0, groups=groups)
    assert [len(plan.examples(step)) for step in range(2)] == [9, 8]


def test_part_of_an_epoch_is_the_nearest_number_of_examples() -> None:
    """In floating point, 47 / 35 times 35 is a little less than 47."""
    for examples in range(1, 200):
        plan = make_plan(count=35, examples_per_step=1, epochs=examples / 35)
        assert plan.num_steps == examples


def test_plan_is_a_function_of_data_batch_and_seed() -> None:
    assert make_plan().fingerprint == make_plan().fingerprint
    assert make_plan().fingerprint != make_plan(seed=4).fingerprint
    assert make_plan().fingerprint != make_plan(examples_per_step=3).fingerprint
    assert make_plan().fingerprint != make_plan(shuffle=False).fingerprint
    lengths, weights = np.array([3, 4, 5], np.int32), np.array([1.0, 2.0, 3.0])
    base = Plan(lengths, weights, Batch(), 0).fingerprint
    assert base != Plan(lengths, weights[::-1], Batch(), 0).fingerprint
    assert base != Plan(lengths[::-1], weights, Batch(), 0).fingerprint


def test_another_seed_is_another_order() -> None:
    orders = {
        tuple(make_plan(seed=seed, examples_per_step=37).examples(0).tolist()) for seed in range(5)
    }
    assert len(orders) == 5


def test_no_examples_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to train on"):
        Plan(np.zeros(0, np.int32), np.zeros(0), Batch(), 0)


# Settings, and the number of steps, the fingerprint and a hash of the order that they always had
PINNED = [
    ({}, 7, "7d7257344a92f97aa311271486b4103c", "6ffca872cf281fb8"),
    ({"epochs": 2.5}, 16, "cb4946ac19d4988e752ac626d78f8e6d", "1195d1594ad9d8f4"),
    ({"steps": 40}, 40, "54a30db85dbee85871f399b01717f62c", "766ce2ac42dc3054"),
    (
        {"examples_per_step": 7, "shuffle": False},
        14,
        "fe94da49993d4ec58ffcf8e080781329",
        "4954951165f7730a",
    ),
    (
        {"tokens_per_step": 300, "epochs": 1.5},
        22,
        "a5638a2466100daf0a53294950c2eaea",
        "161f2d30708abdd8",
    ),
    (
        {"tokens_per_step": 64, "steps": 9},
        9,
        "45e2e3d3ae41f3216f68bf5da9dfc771",
        "ba178b8d857ec6f4",
    ),
    ({"epochs": 0.3}, 2, "8c8738208875d5bb53026f4d0c46d7a3", "63192e8d942f3b8a"),
    (
        {"examples_per_step": 500, "steps": 3},
        3,
        "30d7cd3616f0c35e0d8f82c284573939",
        "e117ab663880bd68",
    ),
]


@pytest.mark.parametrize("seed", range(len(PINNED)))
def test_plans_stay_what_they_were(seed: int) -> None:
    """A run that was begun with an earlier version goes on in the same order."""
    rng = np.random.RandomState(5)
    lengths, weights = rng.randint(2, 90, 97).astype(np.int32), rng.rand(97) * 9
    batch, steps, fingerprint, order = PINNED[seed]
    plan = Plan(lengths, weights, Batch(**batch), seed)
    assert (plan.num_steps, plan.fingerprint) == (steps, fingerprint)
    stream = b"".join(plan.examples(step).tobytes() for step in range(steps))
    assert hashlib.blake2b(stream, digest_size=8).hexdigest() == order


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
    st.floats(0.01, 0.999),
    st.integers(0, 5),
    st.booleans(),
)
def test_a_rotation_shows_all_before_any_again(
    sizes: list[int], share: float, others: int, shuffle: bool
) -> None:
    """Epoch by epoch: whole rows, as many as the share says, none twice in an epoch or before all
    were shown.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])
    per_epoch = max(share * len(sizes), 1.0)
    rotation = Rotation(others + np.arange(starts[-1]), starts, per_epoch)
    count = others + int(starts[-1])
    row_of = np.repeat(np.arange(len(sizes)), sizes)
    batch = Batch(examples_per_step=1, epochs=7, shuffle=shuffle)
    plan = Plan(np.full(count, 3, np.int32), np.ones(count), batch, 1, [rotation])
    epochs: list[list[int]] = [[] for _ in range(8)]
    for step in range(plan.num_steps):
        epochs[int(np.ceil(plan.epoch(step))) - 1] += plan.examples(step).tolist()
    assert plan.epoch(plan.num_steps - 1) == 7
    shown: list[int] = []
    for members in epochs[:7]:
        assert sorted(members)[:others] == list(range(others))
        turning = sorted(set(members) - set(range(others)))
        assert len(members) == others + len(turning)
        rows = sorted({int(row_of[i - others]) for i in turning})
        assert [i - others for i in turning] == [i for i in range(len(row_of)) if row_of[i] in rows]
        shown += rows
    assert len(shown) == pytest.approx(7 * per_epoch, abs=1)
    times = np.bincount(shown, minlength=len(sizes))
    assert times.max() - times.min() <= 1
    assert set(np.flatnonzero(plan.shown()).tolist()) == {i for members in epochs for i in members}


@pytest.mark.parametrize(
    ("examples", "world_size", "each"), [(8, 1, 8), (8, 2, 4), (7, 2, 4), (1, 3, 1)]
)
def test_examples_longer_than_a_pack_get_one_each_and_no_empty_ones_beside(
    examples: int, world_size: int, each: int
) -> None:
    """An empty pack costs a forward and a backward pass."""
    ranks = balanced([50] * examples, 1, world_size)
    assert [len(bins) for bins in ranks] == [each] * world_size
    assert sorted(i for bins in ranks for members in bins for i in members) == list(range(examples))
