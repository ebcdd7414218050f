"""`batch.group_by`: the examples of a group are in one step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sftx.data.dataset import load_corpora
from sftx.data.plan import Plan, plan_of
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.settings.make import make_config
from sftx.settings.schema import Batch, Config
from sftx.types import UserError


def naive_steps(
    order: list[int], groups: list[int], sizes: list[int], room: int
) -> list[list[int]]:
    """Whole groups, one after another, into steps of at most `room`; what is larger than a step is
    cut.
    """
    steps: list[list[int]] = []
    rest = list(order)
    while rest:
        fits = 1
        while fits < len(rest) and sum(sizes[i] for i in rest[: fits + 1]) <= room:
            fits += 1
        whole = fits
        while whole and whole < len(rest) and groups[rest[whole - 1]] == groups[rest[whole]]:
            whole -= 1
        taken = whole or fits
        steps.append(rest[:taken])
        rest = rest[taken:]
    return steps


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=40),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_steps_take_whole_groups(groups: list[int], room: int, shuffle: bool, tokens: bool) -> None:
    lengths = np.random.RandomState(len(groups)).randint(2, 6, len(groups)).astype(np.int32)
    key = "tokens_per_step" if tokens else "examples_per_step"
    batch = Batch.model_validate({key: room, "epochs": 1, "shuffle": shuffle})
    plan = Plan(lengths, np.ones(len(groups)), batch, 3, (), np.array(groups, np.int64))
    steps = [plan.examples(step).tolist() for step in range(plan.num_steps)]
    order = [i for step in steps for i in step]
    assert sorted(order) == list(range(len(groups)))
    runs = [g for k, g in enumerate(groups[i] for i in order) if not k or groups[order[k - 1]] != g]
    assert len(runs) == len(set(groups)), "each group stands together"
    if not shuffle:
        assert runs == list(dict.fromkeys(groups))
    sizes = lengths.tolist() if tokens else [1] * len(groups)
    assert steps == naive_steps(order, groups, sizes, room)


def test_groups_are_shuffled_anew_in_each_epoch_and_decide_the_fingerprint() -> None:
    groups = np.arange(40) // 4
    plans = [
        Plan(
            np.full(40, 5, np.int32), np.ones(40), Batch(examples_per_step=8, epochs=3), seed, (), g
        )
        for seed, g in ((0, groups), (0, None), (0, groups[::-1].copy()), (1, groups))
    ]
    assert len({plan.fingerprint for plan in plans}) == 4
    grouped = plans[0]
    assert grouped.num_steps == 15
    epochs = [
        [int(groups[i]) for step in range(5 * e, 5 * e + 5) for i in grouped.examples(step)]
        for e in range(3)
    ]
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(sorted(epoch) == groups.tolist() for epoch in epochs)
    inside = grouped.examples(0).reshape(2, 4)
    assert (np.diff(inside, axis=1) == 1).all(), "the order within a group stays"


def corpus_of(
    folder: Path, rows: list[dict[str, Any]], group_by: str, **data: Any
) -> tuple[Corpus, Config]:
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = str(folder / "c")
    given = {"train": str(folder / "rows.jsonl"), "workers": 0, "cache": cache, **data}
    sections: dict[str, Any] = {"data": given}
    config = make_config(
        model=str(folder / "model"),
        output=str(folder / "out"),
        **sections,
        batch={"group_by": group_by, "examples_per_step": 4, "shuffle": False},
    )
    corpus, _ = load_corpora(config, Tokenizer.load(str(folder / "model")), 64)
    return corpus, config


ROWS = [
    {"prompt": f"question {i % 3}", "completion": f"answer {i}", "story": ["x", i % 2]}
    for i in range(12)
]


@pytest.mark.parametrize(
    ("group_by", "key"),
    [("prompt", lambda i: i % 3), ("story", lambda i: i % 2), ("row", lambda i: i)],
)
def test_groups_of_rows(tmp_path: Path, group_by: str, key: Any) -> None:
    corpus, config = corpus_of(tmp_path, ROWS, group_by, columns={"story": None})
    plan = plan_of(corpus, config)
    assert plan.groups is not None
    rows = [int(corpus.line[i]) - 1 for i in range(len(corpus))]
    same = {(key(a), int(g)) for a, g in zip(rows, plan.groups, strict=True)}
    assert len(same) == len({k for k, _ in same}) == len({g for _, g in same})


def test_pieces_of_a_row_are_a_group(tmp_path: Path) -> None:
    rows = [{"text": "a long text " * (9 if i % 2 else 1)} for i in range(6)]
    corpus, config = corpus_of(tmp_path, rows, "row")
    plan = plan_of(corpus, config)
    assert len(corpus) > 6
    for step in range(plan.num_steps):
        chosen = plan.examples(step)
        for line in np.unique(corpus.line[chosen]):
            assert np.count_nonzero(corpus.line == line) == np.count_nonzero(
                corpus.line[chosen] == line
            )


def test_rows_without_the_field_stand_alone_and_a_wrong_name_is_said(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    for row in rows[::2]:
        del row["story"]
    corpus, config = corpus_of(tmp_path, rows, "story", eval_split=0.2, columns={"story": None})
    plan = plan_of(corpus, config)
    assert plan.groups is not None
    lonely = [int(g) for i, g in enumerate(plan.groups) if corpus.line[i] % 2]
    assert len(set(lonely)) == len(lonely)
    assert len(set(plan.groups.tolist())) == len(lonely) + 1
    with pytest.raises(UserError, match=r"batch.group_by: stroy: no row has a field of this name"):
        corpus_of(tmp_path, rows, "stroy", columns={"story": None})
