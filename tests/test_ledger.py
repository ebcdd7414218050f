"""The ledger: what was not read, what was shown, what stands behind a shortened prompt."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal, Unpack

import pytest
import tiny

from sftx.data.dataset import load_corpora
from sftx.data.plan import plan_of
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.settings.keywords import BatchSettings, DataSettings, SourceSettings
from sftx.settings.make import make_config
from sftx.settings.schema import Config

USER, MODEL = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.of(tiny.tokenizer())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))


def load(tokenizer: Tokenizer, length: int = 64, **data: Unpack[DataSettings]) -> Corpus:
    return load_corpora(
        make_config(model="m", output="o", data={"workers": 0, **data}), tokenizer, length
    )[0]


def test_fields_of_messages_that_nobody_here_knows_are_counted(tokenizer: Tokenizer) -> None:
    rows = [
        {"messages": [USER, {**MODEL, "id": str(i), "source": "x" if i else None}]}
        for i in range(3)
    ]
    assert load(tokenizer, rows=rows).ledger.notes == {
        "message field 'id' left to the template": 3,
        "message field 'source' left to the template": 2,
    }


def test_a_message_that_another_tool_would_not_train_is_not_trained(tokenizer: Tokenizer) -> None:
    talk = [USER, {**MODEL, "content": "bad", "loss": False}, USER, {**MODEL, "content": "good"}]
    corpus = load(tokenizer, rows=[{"messages": talk}])
    example = corpus.example(0)
    assert tokenizer.decode(example.ids[example.weights > 0].tolist()) == "good<|end|>"


def mixture(
    tmp_path: Path,
    weights: tuple[float, float],
    mix_by: Literal["rows", "tokens"],
    seed: int = 0,
    **batch: Unpack[BatchSettings],
) -> Config:
    """500 rows of 14 tokens and 100 of 34, by name a and b."""
    train: list[SourceSettings] = []
    for name, count, text, weight in (
        ("a", 500, "x", weights[0]),
        ("b", 100, "y" * 21, weights[1]),
    ):
        rows = [{"prompt": f"{i:03d}", "completion": text} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train.append({"path": str(tmp_path / f"{name}.jsonl"), "name": name, "weight": weight})
    data: DataSettings = {"train": train, "mix_by": mix_by, "workers": 0}
    return make_config(
        model="m", output="o", data=data, batch={"examples_per_step": 10, **batch}, seed=seed
    )


def shown(config: Config, tokenizer: Tokenizer) -> tuple[Counter[str], Corpus]:
    """How often each row stands in a step of the run."""
    corpus, _ = load_corpora(config, tokenizer, 64)
    plan = plan_of(corpus, config)
    places = [corpus.place(int(i)) for step in range(plan.num_steps) for i in plan.examples(step)]
    return Counter(places), corpus


def test_a_share_of_a_source_is_another_one_in_each_epoch(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Equal weights by tokens, where one source has more of them: in three epochs each of its rows
    is shown.
    """
    times, corpus = shown(mixture(tmp_path, (1, 1), "tokens", epochs=3), tokenizer)
    share = corpus.rotations[0].share()
    assert 0.4 < share < 0.9
    counts = [times[f"{tmp_path}/a.jsonl:{line}"] for line in range(1, 501)]
    assert set(counts) == {1, 2} if share < 2 / 3 else {2, 3}
    assert {name: ledger.shown for name, ledger in corpus.ledgers.items()} == {"a": 500, "b": 100}
    assert "in no step" not in corpus.ledger.summary()


def test_the_ledger_knows_what_is_never_shown(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Rows that no step shows, by the share of a source or because the run is short, are no part of
    `shown`.
    """
    times, corpus = shown(mixture(tmp_path, (0.2, 1), "rows", epochs=2), tokenizer)
    assert {name: ledger.shown for name, ledger in corpus.ledgers.items()} == {"a": 200, "b": 100}
    assert len(times) == 300
    assert "; 300 of these rows are in no step of this run; " in corpus.ledgers["a"].summary()
    assert corpus.ledger.shown == 300
    other, _ = shown(mixture(tmp_path, (0.2, 1), "rows", epochs=2, seed=1), tokenizer)
    assert other.keys() != times.keys()
    times, corpus = shown(mixture(tmp_path, (1, 2.5), "rows", steps=30), tokenizer)
    assert corpus.ledger.shown == len(times) < 300


def test_a_mixture_is_part_of_the_identity_of_a_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpora = [
        shown(mixture(tmp_path, (share, 1), "rows"), tokenizer)[1] for share in (0.2, 0.3, 0.2)
    ]
    assert corpora[0].fingerprint == corpora[2].fingerprint != corpora[1].fingerprint


def test_a_share_of_held_out_rows_is_always_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = str(tmp_path / "e.jsonl")
    Path(path).write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)))
    data: DataSettings = {
        "rows": [{"text": "a"}],
        "eval": [{"path": path, "weight": 1.25}],
        "workers": 0,
    }
    held = load_corpora(make_config(model="m", output="o", data=data), tokenizer, 64)[1]
    assert held is not None
    assert (len(held), held.rotations, held.ledger.shown) == (50, (), 40)


TALK = [{**USER, "content": "x" * 60}, {**MODEL, "content": "y" * 60}]


def test_a_cut_is_a_warning_of_its_own(tokenizer: Tokenizer) -> None:
    """What is gone, and what stands behind less than it should, in numbers that can be added up by
    hand.
    """
    # A pair is <|user|> x... <|end|> \n <|assistant|> y... <|end|>: 64 tokens of context and 61
    # targets; 251 for two.
    rows = [{"messages": TALK * 2}, {"messages": TALK}]
    corpus = load(tokenizer, 140, rows=rows)
    assert corpus.ledger.warnings() == [
        "61 targets (33.3 %) stand behind a shortened prompt; raise data.max_length to train them "
        "behind the whole one"
    ]
    assert [corpus.example(i).shortened for i in range(3)] == [False, True, False]
    assert "lost" not in corpus.ledger.summary()
    cut = load(
        tokenizer, 140, rows=rows, too_long="truncate_left"
    ).ledger  # its first token has nothing before it
    assert cut.warnings() == [
        "1 rows lost 111 tokens and 48 targets with them; raise data.max_length to keep them",
        "74 targets (54.8 %) stand behind a shortened prompt; raise data.max_length to train them "
        "behind the whole one",
    ]
    long = load(tokenizer, 140, rows=[{"messages": [{**USER, "content": "x" * 200}, MODEL]}]).ledger
    assert (
        long.warnings()[0]
        == "1 rows lost 70 tokens of context, and no target; raise data.max_length to keep them"
    )
    assert load(tokenizer, 300, rows=rows).ledger.warnings() == []


def test_one_sequence_per_turn_names_what_it_multiplies(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    newest = "{{ '!' if loop.last and message.role == 'assistant' }}{{ message.content }}"
    (tmp_path / "t.jinja").write_text(tiny.CHAT_TEMPLATE.replace("{{ message.content }}", newest))
    corpus = load(
        tokenizer, 600, rows=[{"messages": TALK * 3}] * 2, template=str(tmp_path / "t.jinja")
    )
    assert corpus.ledger.notes == {"one sequence per turn": 2}
    longest = [int(corpus.lengths[[i, i + 1, i + 2]].max()) for i in (0, 3)]
    assert corpus.ledger.tokens_repeated == int(corpus.lengths.sum()) - sum(longest)
    [warning] = corpus.ledger.warnings()
    assert f"makes 2.0 times the tokens ({corpus.ledger.tokens:,} of {sum(longest):,})" in warning
    assert "data.train_on: last" in warning
