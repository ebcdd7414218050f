"""`data.weights` and the weight of a row: which tokens count how much.

The oracle finds a content's characters in the text of the tokens, one token at a time, and shares no
code with sftx.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_tokenizers
import tiny
import torch
from small_templates import TRAITS, chatml
from test_small_templates import TABLE, encoder, tokenizers
from test_template import turn_by_turn
from transformers import PreTrainedTokenizerFast

import sftx
from sftx.cli import main
from sftx.data.chat.spans import APART
from sftx.data.dataset import load_corpora
from sftx.data.encoder import Encoded, Encoder
from sftx.data.sources.rows import parse
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.settings.load import load_config
from sftx.settings.make import make_config
from sftx.settings.schema import Data
from sftx.types import KINDS, Example, RowError, UserError

WEIGHTS = {"user": 0.25, "system": 0.5, "tool": 0.125, "reasoning": 0.375}
PLAIN = tiny.tokenizer()
TALK = [
    {"role": "system", "content": "Be terse, Zebra."},
    {"role": "user", "content": "  assistant quokka?\n"},
    {"role": "assistant", "content": "A marsupial."},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "No."},
]


def letters(theirs: Any, example: Example) -> list[str]:
    """The text of each token, by the vocabulary alone."""
    pieces = [str(token) for token in theirs.convert_ids_to_tokens(example.ids.tolist())]
    if "▁" in "".join(theirs.get_vocab()):
        return [piece.replace("▁", " ") for piece in pieces]
    return [theirs.decode([int(i)]) for i in example.ids]


def counted(theirs: Any, example: Example, content: str, before: str = "") -> np.ndarray[Any, Any]:
    """bool[T]: the tokens that hold a character of `content`, behind the first `before`."""
    pieces = letters(theirs, example)
    text = "".join(pieces)
    begin = text.index(content, text.index(before) + len(before))
    held, at = [], 0
    for piece in pieces:
        held.append(at < begin + len(content) and at + len(piece) > begin)
        at += len(piece)
    return np.array(held)


def encoded(row: Any, tokenizer: Any = PLAIN, **settings: Any) -> Example:
    [example] = sftx.encode(row, tokenizer, **settings)
    return example


def by_kind(example: Example) -> dict[str, list[float]]:
    """The weights of the tokens of each kind."""
    assert example.kinds is not None
    kinds = np.array(KINDS)[example.kinds]
    return {str(k): sorted({float(w) for w in example.weights[kinds == k]}) for k in {*kinds}}


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("name", TRAITS)
def test_no_token_moves_and_no_output_weighs_otherwise(kind: str, name: str) -> None:
    """With every template, in every conversation, from one rendering and turn by turn."""
    ours, _ = tokenizers(TRAITS[name], kind)
    rows = [TABLE.row_of(talk) for talk in TABLE.CONVERSATIONS]
    plain = encoder(ours).encode(rows)
    weighed = encoder(ours, weights=WEIGHTS).encode(rows)
    slowly = turn_by_turn(encoder(ours, weights=WEIGHTS)).encode(rows)
    for before, after, slow in zip(plain, weighed, slowly, strict=True):
        if isinstance(before, RowError) or isinstance(after, RowError):
            assert str(before) == str(after)
            continue
        assert isinstance(slow, Encoded)
        for one, other, third in zip(before.examples, after.examples, slow.examples, strict=True):
            assert np.array_equal(one.ids, other.ids)
            assert np.array_equal(one.weights != 0, other.said)
            assert other.kinds is not None
            same = other.kinds == KINDS.index("output")
            assert np.array_equal(one.weights[same], other.weights[same])
            assert np.array_equal(other.weights, third.weights)
            assert third.kinds is not None
            assert np.array_equal(other.kinds, third.kinds)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "calls as JSON",
        "history rewritten",
        "thoughts kept",
        "content in parts",
        "BOS inside",
    ],
)
def test_contents_count_and_nothing_around_them_does(kind: str, name: str) -> None:
    ours, theirs = tokenizers(TRAITS[name], kind)
    talk = [
        {"role": "user", "content": "yes, the fox?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "hello quick dog"},
        {"role": "assistant", "content": "I think it is 4"},
    ]
    found = encoder(ours, weights=WEIGHTS).encode([parse({"messages": talk}, "messages")])[0]
    assert isinstance(found, Encoded)
    done: set[str] = set()
    for example in found.examples:
        expected = np.where(example.said, example.weights, 0)
        for content in ("yes, the fox?", "hello quick dog"):
            if content in "".join(letters(theirs, example)) and content not in done:
                done.add(content)
                expected[counted(theirs, example, content)] = 0.25
        assert np.array_equal(example.weights, expected)
        assert {*example.weights[example.said][1:]} <= {1.0}
    assert len(done) == 2


def test_a_token_that_lies_across_the_border_belongs_to_the_content() -> None:
    """Behind the header stands a space, which the tokenizer merges with the first letters."""
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    theirs = PreTrainedTokenizerFast(tokenizer_object=small_tokenizers.backend(), eos_token="</s>")
    theirs.chat_template = source
    talk = [{"role": "user", "content": "hello dog"}, {"role": "assistant", "content": "yes"}]
    example = encoded({"messages": talk}, theirs, weights={"user": 0.25})
    expected = counted(theirs, example, "hello dog")
    across = letters(theirs, example)[int(np.flatnonzero(expected)[0])]
    assert across.startswith(" ")
    assert np.array_equal(example.weights == 0.25, expected)


def test_a_word_of_a_header_or_of_another_turn_is_not_taken_for_a_content() -> None:
    example = encoded({"messages": TALK}, weights=WEIGHTS)
    text = PLAIN.decode(example.ids)
    assert text.count("user") == 3
    expected = np.where(example.said, 1, 0).astype(np.float32)
    expected[counted(PLAIN, example, "Be terse, Zebra.")] = 0.5
    expected[counted(PLAIN, example, "  assistant quokka?\n")] = 0.25
    expected[counted(PLAIN, example, "user", "A marsupial.<|end|>\n<|user|>")] = 0.25
    assert np.array_equal(example.weights, expected)
    assert by_kind(example)["output"] == [1.0]


def with_body(body: str) -> Any:
    """A tokenizer of transformers whose ChatML has this body."""
    return PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizers.backend(), eos_token="</s>", chat_template=chatml(body)
    )


def asks(content: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    }


def test_a_content_that_cannot_be_told_apart_is_refused() -> None:
    theirs = with_body("{{ m.content if m.content|length < 8 else 'long' }}")
    row = asks("1234567")  # with marks around it, it is long
    with pytest.raises(UserError, match=r"turn 0: the chat template rewrites the content"):
        sftx.encode(row, theirs, weights={"user": 0.5})
    assert encoded(row, theirs, weights={"user": 0}).targets  # nothing has to be told apart


@pytest.mark.parametrize(("form", "content"), [("trim", "hi there"), ("tojson", "  hi there\\n")])
def test_a_content_that_the_template_changes_is_found(form: str, content: str) -> None:
    theirs, row = with_body("{{ m.content | " + form + " }}"), asks("  hi there\n")
    example = encoded(row, theirs, weights={"user": 0.5})
    assert np.array_equal(example.weights == 0.5, counted(theirs, example, content))


@pytest.mark.parametrize("field", ["reasoning_content", "content"])
def test_a_thought_counts_apart_from_its_answer_whatever_field_it_came_in(field: str) -> None:
    body = (
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}"
    )
    theirs = with_body(body)
    answer = {"content": "It is 4", "reasoning_content": "2 and 2"}
    if field == "content":
        answer = {"content": "<think>\n2 and 2\n</think>\n\nIt is 4"}
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **answer}]}
    plain = encoded(row, theirs)
    for weights, said, thought in (
        ({"reasoning": 0.5}, 1.0, 0.5),
        ({"reasoning": 0}, 1.0, 0.0),
        ({"assistant": 0.5}, 0.5, 0.5),
        ({"assistant": 0, "reasoning": 2}, 0.0, 2.0),
    ):
        example = encoded(row, theirs, weights=weights)
        assert np.array_equal(example.ids, plain.ids)
        expected = np.where(plain.weights != 0, said, 0)
        expected[counted(theirs, example, "2 and 2", "<think>")] = thought
        assert np.array_equal(example.weights, expected), weights


def test_a_thought_that_the_prompt_opens_is_found() -> None:
    ours, theirs = tokenizers(TRAITS["thought opened and written"], "byte_level")
    found = encoder(ours, weights=WEIGHTS).encode([TABLE.row_of("mixed")])[0]
    assert isinstance(found, Encoded)
    first = found.examples[0]
    assert np.array_equal(first.weights == 0.375, counted(theirs, first, "Say ho.", "<think>"))


def test_prompts_of_pairs_and_alpaca_rows_weigh_as_prompts_or_else_as_users() -> None:
    alpaca = {"instruction": "Say", "input": "it", "output": "So.", "history": [["A?", "B."]]}
    rows: list[Any] = [
        {"prompt": "Say\n\nit", "completion": "So."},
        ["Say\n\nit", "So."],
        alpaca,
        {**alpaca, "system": "Sir"},
        {"prompt": [{"role": "user", "content": "Say\n\nit"}], "completion": [TALK[-1]]},
    ]
    for row in rows:
        found = encoded(row, weights={"prompt": 0.5, "user": 0.25})
        assert by_kind(found)["prompt"] == [0.5]
        assert counted(PLAIN, found, "Say\n\nit")[found.weights == 0.5].any()
        assert by_kind(encoded(row, weights={"user": 0.25}))["user"] == [0.25]
        assert "prompt" not in by_kind(encoded(row, weights={"system": 0.25}))
    joined = encoded(alpaca, template="none", weights={"prompt": 0.5})
    assert np.array_equal(joined.ids, encoded(alpaca, template="none").ids)
    first, *rest = [float(w) for w in joined.weights]
    assert (first, {*rest}) == (0.0, {0.5, 1.0})  # nothing stands before the first token


def test_weights_multiply_and_marks_of_messages_hold() -> None:
    talk = [
        {"role": "user", "content": "Apple", "weight": 0.5},
        {"role": "assistant", "content": "One.", "weight": 0.5},
        {"role": "user", "content": "Berry", "train": False},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Cherry", "train": True},
        {"role": "assistant", "content": "Three."},
    ]
    row = {"messages": talk, "weight": 3}
    found = encoded(row, weights={"user": 0.25, "assistant": 0.5})
    for content, weight in (
        ("Apple", 0.375),
        ("One.<|end|>", 0.75),
        ("Berry", 0.0),
        ("Two.<|end|>", 1.5),
        ("Cherry<|end|>", 0.75),  # a turn that is trained has its stop token
        ("Three.<|end|>", 1.5),
    ):
        held = counted(PLAIN, found, content)
        assert {*found.weights[held].tolist()} == {weight}, content
    last = encoded(row, train_on="last", weights={"assistant": 0.5, "user": 0.25})
    assert {*last.weights[counted(PLAIN, last, "Two.<|end|>")].tolist()} == {0.0}
    assert {*last.weights[counted(PLAIN, last, "Apple")].tolist()} == {0.375}


FORMATS: dict[str, Any] = {
    "text": {"text": "abc"},
    "pairs": {"prompt": "a", "completion": "bc"},
    "dialogue": {"dialogue": ["a", "b", "c", "d"]},
    "messages": {"messages": TALK},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "output": "b", "history": [["c", "d"]]},
    "segments": {"segments": [{"text": "ab", "weight": 0.5}, {"text": "c", "weight": 2}]},
    "tokens": {"input_ids": [5, 6, 7], "weights": [1, 0.5, 2]},
    "pair of messages": {"prompt": TALK[:2], "completion": TALK[2:3]},
}


@pytest.mark.parametrize("template", ["auto", "none"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_of_a_row_multiplies_all_of_it_in_every_format(name: str, template: str) -> None:
    row = FORMATS[name]
    for given in ({}, {"user": 0.5}):
        once = encoded(row, template=template, weights=given)
        for weight in (2, 0.25):
            again = encoded({**row, "weight": weight}, template=template, weights=given)
            assert np.array_equal(again.ids, once.ids)
            assert np.array_equal(again.weights, once.weights * np.float32(weight))
        assert np.array_equal(encoded({**row, "weight": None}, weights=given).ids, encoded(row).ids)
        assert sftx.encode({**row, "weight": 0}, PLAIN, template=template, weights=given) == []
    for wrong in (-1, math.nan, math.inf, "1", True, [1.0]):
        with pytest.raises(UserError, match=r"^weight must be a number of at least 0 "):
            sftx.encode({**row, "weight": wrong}, PLAIN)


def corpus_of(path: Path, **data: Any) -> Corpus:
    cache = str(path.parent / "cache")
    settings: Any = {"train": str(path), "cache": cache, "workers": 0, **data}
    config = make_config(model="unused", output="unused", data=settings)
    return load_corpora(config, Tokenizer.of(PLAIN), data.get("max_length", 512))[0]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_may_weigh_its_rows(suffix: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{i}", "completion": "abc", "share": weight}
        for i, weight in enumerate([1.0, 0.5, None, 0, 2.5])
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "parquet":
        arrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    corpus = corpus_of(path, columns={"share": "weight"})
    assert corpus.weights.tolist() == [4.0, 2.0, 4.0, 10.0]  # three letters and the stop token
    assert (corpus.ledger.dropped, corpus.drops[0].reason) == (1, "the row has weight 0")
    assert corpus.ledger.notes == {}


@pytest.mark.parametrize("value", ["-1", "NaN", "Infinity", '"heavy"', "1e39"])
def test_a_bad_weight_is_named_with_its_place(value: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "a b", "weight": ' + value + "}\n")
    with pytest.raises(UserError, match=r"rows.jsonl:2: weight must be a number of at least 0"):
        corpus_of(path)
    table = tmp_path / "rows.csv"
    table.write_text("text,weight\na b,\na b,heavy\n")
    with pytest.raises(UserError, match=r"rows.csv:3: weight must be a number .* not 'heavy'"):
        corpus_of(table)
    with pytest.raises(UserError, match="multiply to more than"):
        sftx.encode({"segments": [{"text": "ab", "weight": 1e30}], "weight": 1e30}, PLAIN)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{user: -1}", "user: number >= 0"),
        ("{user: .nan}", "found"),
        ("{user: .inf}", "found"),
        ("{user: much}", "found"),
        ("{usr: 1}", "system / developer / user / assistant / tool / reasoning / prompt"),
    ],
)
def test_a_bad_setting_is_named_with_its_place(value: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\noutput: o\ndata:\n  train: rows\n  weights: {value}\n")
    with pytest.raises(UserError) as raised:
        load_config(str(path), [])
    assert f"{path}:5: data.weights" in str(raised.value)
    assert (said if said != "user: number >= 0" else "a number") in str(raised.value)


def long_talk(turns: int) -> dict[str, Any]:
    talk: list[dict[str, str]] = [{"role": "system", "content": "Sir."}]
    for i in range(turns):
        talk.append({"role": "user", "content": f"question {i:03} " + "x" * (7 * i % 40)})
        talk.append({"role": "assistant", "content": f"answer {i:03} " + "y" * (11 * i % 50)})
    return {"messages": talk}


@pytest.mark.parametrize("max_length", [48, 90, 200])
def test_split_rows_count_every_content_once(max_length: int) -> None:
    row = long_talk(12)
    whole = encoded(row, weights=WEIGHTS)
    plain = sftx.encode(row, PLAIN, max_length=max_length)
    pieces = sftx.encode(row, PLAIN, max_length=max_length, weights=WEIGHTS)
    assert len(pieces) > 1
    assert all(len(piece.ids) <= max_length for piece in pieces)
    for kind in ("output", "user", "system"):
        number = KINDS.index(kind)
        found = sum(int(((p.kinds == number) & (p.weights != 0)).sum()) for p in pieces)
        assert found == int(((whole.kinds == number) & (whole.weights != 0)).sum()), kind
    trained = sum(int(piece.said.sum()) for piece in pieces)
    assert trained == sum(example.targets for example in plain)


@pytest.mark.parametrize("too_long", ["truncate_left", "truncate_right"])
def test_what_is_cut_off_is_counted(too_long: str) -> None:
    row = long_talk(6)
    whole = encoded(row, weights=WEIGHTS)
    settings = {"max_length": 150, "too_long": too_long, "weights": WEIGHTS}
    made = Encoder(Tokenizer.of(PLAIN), Data.model_validate(settings), 150)
    found = made.encode([parse(row, "messages")])[0]
    assert isinstance(found, Encoded)
    [example] = found.examples
    assert found.targets_truncated == whole.targets - example.targets > 0
    assert example.shortened == (too_long == "truncate_left")
    cut = slice(0, 150) if too_long == "truncate_right" else slice(len(whole.ids) - 150, None)
    assert np.array_equal(example.weights[1:], whole.weights[cut][1:])


def test_text_that_spells_a_special_token_is_weighed_with_the_rest() -> None:
    talk = [
        {"role": "user", "content": "a <|end|> b <|user|>"},
        {"role": "assistant", "content": "c"},
    ]
    example = encoded({"messages": talk}, weights={"user": 0.5})
    assert np.array_equal(example.weights == 0.5, counted(PLAIN, example, "a <|end|> b <|user|>"))


def test_outputs_that_are_tokenised_apart_count_each_content_once() -> None:
    ours, theirs = tokenizers(TRAITS["plain"], "metaspace")
    found = encoder(ours, weights=WEIGHTS).encode([TABLE.row_of("white")])[0]
    assert isinstance(found, Encoded)
    assert APART in found.notes
    asked = [m["content"] for m in TABLE.CONVERSATIONS["white"][0] if m["role"] == "user"]
    for number, example in enumerate(found.examples):
        text = theirs.decode(example.ids[example.weights == 0.25].tolist())
        assert text.strip() == asked[number].strip()


def test_the_ledger_counts_tokens_by_kind_and_the_kinds_add_up(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": TALK, "weight": 1 + i % 3} for i in range(9)]
    rows[0]["weight"] = 0
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = corpus_of(path, weights=WEIGHTS)
    ledger = corpus.ledger
    example = corpus.example(0)
    assert example.kinds is not None
    assert {*ledger.kinds} == {"context", "output", "system", "user"}
    assert sum(count["tokens"] for count in ledger.kinds.values()) == ledger.tokens
    assert sum(count["targets"] for count in ledger.kinds.values()) == ledger.targets
    assert sum(c["weight"] for c in ledger.kinds.values()) == pytest.approx(corpus.weights.sum())
    user = sum(len(m["content"]) for m in TALK if m["role"] == "user")
    total = sum(float(row["weight"]) for row in rows)
    assert ledger.kinds["user"] == {
        "tokens": 8 * user,
        "targets": 8 * user,
        "weight": pytest.approx(0.25 * user * total),
    }
    held = np.arange(8) < 3
    parts = [part.ledger for part in corpus.divide(held)]
    assert parts[0].kinds["user"]["tokens"] == 5 * user
    assert "user 200 (weight" in ledger.summary().replace(f"{8 * user:,}", "200")
    plain = corpus_of(path)
    assert plain.ledger.by_kind() == ""
    assert {*plain.ledger.kinds} == {"output", "context"}
    assert plain.ledger.kinds["output"]["targets"] == plain.ledger.targets
    assert plain.example(0).kinds is None


def test_without_weights_no_key_of_the_cache_and_no_token_changes(tmp_path: Path) -> None:
    made = Encoder(Tokenizer.of(PLAIN), Data(), 512)
    assert made.fingerprint == Encoder(Tokenizer.of(PLAIN), Data(weights={}), 512).fingerprint
    assert (
        made.fingerprint != Encoder(Tokenizer.of(PLAIN), Data(weights={"user": 0}), 512).fingerprint
    )


def test_a_kind_that_never_occurs_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TALK}))
    corpus_of(path, weights={"tool": 0, "user": 0.5, "assistant": 1})
    assert [record.getMessage() for record in caplog.records] == [
        "warning: data.weights.tool: no row has a text of this kind"
    ]


def test_a_row_whose_weights_are_all_zero_is_dropped_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": TALK}, {"messages": TALK, "weight": 0}]
    thinks = {"role": "assistant", "content": "<think>hm</think>so"}
    rows.append({"messages": [TALK[1], thinks]})
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = corpus_of(path, weights={"assistant": 0, "reasoning": 1})
    assert [(drop.line, drop.bad) for drop in corpus.drops] == [(1, False), (2, False)]
    assert "no token to learn" in corpus.drops[0].reason
    assert corpus.ledger.targets == 2


def test_a_run_trains_and_evaluates_by_these_weights(tmp_path: Path) -> None:
    """The loss of a step, and of each held-out source, is the weighted mean over the very tokens."""
    folder = tiny.folder(tmp_path / "model")
    rows = [{"messages": TALK, "weight": 0.5 + i} for i in range(4)]
    held = {"a": {"prompt": "x", "completion": "yyyy"}, "b": {"messages": TALK, "weight": 3}}
    for name, row in held.items():
        lines = [row, {**row, "weight": 0.25}, FORMATS["pairs"]]
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(map(json.dumps, lines[: 2 + (name == "a")]))
        )
    weights = {"user": 0.5, "prompt": 0.25}
    result = sftx.train(
        model=folder,
        data={
            "rows": rows,
            "eval": [{"path": str(tmp_path / f"{name}.jsonl"), "name": name} for name in held],
            "weights": weights,
            "cache": str(tmp_path / "cache"),
            "workers": 0,
        },
        output=str(tmp_path / "run"),
        batch={"examples_per_step": 4, "epochs": 1},
        optim={"learning_rate": 1e-9},
        runtime={"progress": False, "device": "cpu", "threads": 1},
    )
    model = tiny.model(tie_word_embeddings=True)
    data = [encoded(row, weights=weights) for row in rows]
    expected = float(tiny.naive_loss(model, data).detach())
    assert result.metrics[1].loss == pytest.approx(expected, rel=1e-5)
    assert result.metrics[1].weight == pytest.approx(sum(float(e.weights.sum()) for e in data))
    assert result.eval_before is not None
    for name in held:
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        some = [encoded(json.loads(line), weights=weights) for line in lines]
        with torch.no_grad():
            loss = float(tiny.naive_loss(model, some))
        assert result.eval_before[f"loss of {name}"] == pytest.approx(loss, rel=1e-5)
    kinds = json.loads((tmp_path / "run" / "ledger.json").read_text())["all"]["kinds"]
    assert kinds["user"]["weight"] == pytest.approx(
        0.5 * 8 * sum(len(m["content"]) for m in TALK if m["role"] == "user")
    )


def test_inspect_plan_and_lint_show_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.folder(tmp_path / "model")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TALK, "weight": 2}))
    run = [f"model={folder}", f"data.train={path}", f"data.cache={tmp_path / 'cache'}"]
    run += ["data.weights={user: 0.25}", "runtime.device=cpu"]
    page = tmp_path / "page.html"
    assert main(["inspect", *run, f"html={page}"]) == 0
    shown = capsys.readouterr().out
    assert "⟦0.5:user⟧" in shown
    assert "⟦2:No.<|end|>⟧" in shown
    assert "tokens by kind: " in page.read_text()
    assert main(["plan", *run]) == 0
    assert "tokens by kind: context" in capsys.readouterr().out
    main(["lint", *run])
    said = capsys.readouterr().out
    assert "tokens by kind: context" in said
    assert "endless outputs" not in said
