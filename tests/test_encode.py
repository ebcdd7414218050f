"""From settings to corpora: every row accounted for, whatever the number of processes, the cache or
the file format.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_tokenizers
import tiny

import sftx
from sftx.data.dataset import load_corpora, write_ledger
from sftx.data.plan import plan_of
from sftx.data.sources import read
from sftx.data.store import encode_pool
from sftx.data.store.corpus import Corpus
from sftx.data.token_view import raw_tables, read_rows
from sftx.data.tokenizer import Tokenizer
from sftx.settings.keywords import BatchSettings, SourceSettings
from sftx.settings.make import make_config
from sftx.settings.schema import Config
from sftx.types import Example, Row, UserError

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.of(tiny.tokenizer())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))


def make(data: Any, **settings: Any) -> Config:
    given: dict[str, Any] = {"train": data}
    if isinstance(data, list) and data and not isinstance(data[0], str):
        given = {"rows": data}
    sections: dict[str, Any] = {"data": {**given, "workers": 0, **settings}}
    return make_config(model="unused", output="unused", **sections)


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(start, start + count)
    ]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokens(corpus: Corpus | None) -> list[tuple[list[int], list[float]]]:
    assert corpus is not None
    examples = [corpus.example(i) for i in range(len(corpus))]
    return [(e.ids.tolist(), e.weights.tolist()) for e in examples]


def load(
    config: Config, tokenizer: Tokenizer, length: int = LENGTH
) -> tuple[Corpus, Corpus | None]:
    return load_corpora(config, tokenizer, length)


def test_encode_is_what_the_corpus_holds(tokenizer: Tokenizer) -> None:
    """The public function and the cache give the same examples, for rows of every format."""
    message = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    samples: list[Any] = [
        {"text": "plain text " * 20},
        ("a prompt", "an output"),
        {"prompt": "p", "completion": "c"},
        {"messages": message},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "i", "output": "o"},
        {"segments": [{"text": "a", "weight": 0}, {"text": "b", "weight": 0.5}]},
        {"input_ids": np.arange(3, 9), "weights": (0, 0, 1, 1, 0.5, 0)},
    ]
    for row in samples:
        alone = sftx.encode(row, tokenizer, max_length=LENGTH)
        corpus, _ = load(make([row, row]), tokenizer)
        assert tokens(corpus) == 2 * [(e.ids.tolist(), e.weights.tolist()) for e in alone]
        assert all(
            e.ids.dtype == np.int32 and e.weights.dtype == np.float32 and len(e.ids) <= LENGTH
            for e in alone
        )
    assert tokens(tiny.corpus(sftx.encode("a", tiny.tokenizer()))) == tokens(
        load(make([{"text": "a"}]), tokenizer)[0]
    )


def test_encode_takes_settings_and_refuses_others(tokenizer: Tokenizer) -> None:
    row = {"prompt": "a", "completion": "b" * 200}
    assert len(sftx.encode(row, tokenizer, max_length=50)) > 1
    assert sftx.encode(row, tokenizer, max_length=50, too_long="drop") == []
    assert sftx.encode({"prompt": 1}, tokenizer, on_bad_row="skip") == []
    wrong: dict[str, dict[str, Any]] = {
        "no setting max_lenght": {"max_lenght": 5},
        "no setting workers": {"workers": 2},
        "max_length": {"max_length": 1},
    }
    for message, settings in wrong.items():
        with pytest.raises(UserError, match=message):
            sftx.encode(row, tokenizer, **settings)
    with pytest.raises(UserError, match="missing"):
        sftx.encode(row, tokenizer, format="messages")


def test_every_file_format_gives_the_same_corpus(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = pairs(30)
    expected, _ = load(make(rows), tokenizer)
    plain = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    (tmp_path / "d.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows)
    )
    for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.csv"):
        for _ in range(2):  # encoded, then from the cache
            corpus, _ = load(make(str(tmp_path / name)), tokenizer)
            assert tokens(corpus) == tokens(expected), name
            assert corpus.fingerprint == expected.fingerprint
            assert corpus.ledger.read == 30
    everything, _ = load(make(str(tmp_path)), tokenizer)
    assert tokens(everything) == 4 * tokens(expected)
    assert everything.place(31) == f"{tmp_path / 'b.json'}, row 2"
    assert everything.place(90) == f"{tmp_path / 'd.csv'}:2"


def many(tmp_path: Path, count: int = 6000) -> str:
    random.seed(1)
    words = ["one", "two", "drei", "vier ", "\u4e94", "six\n"]
    return write(
        tmp_path / "many.jsonl",
        [{"text": "".join(random.choices(words, k=99))} for _ in range(count)],
    )


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MIN_BLOCK", 1 << 16)
    monkeypatch.setattr(read, "MAX_BLOCK", 1 << 18)
    monkeypatch.setattr(encode_pool, "WORTH_A_PROCESS", 1 << 10)


@pytest.mark.usefixtures("_small_blocks")
def test_processes_change_nothing(tmp_path: Path) -> None:
    path = many(tmp_path, 3000)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(str(tmp_path / "tokenizer"))
    alone, _ = load(make(path, cache=str(tmp_path / "1")), tokenizer)
    seen: list[tuple[int, int]] = []
    config = make(path, cache=str(tmp_path / "2"), workers=2)
    together, _ = load_corpora(
        config, tokenizer, LENGTH, lambda done, total: seen.append((done, total))
    )
    assert together.fingerprint == alone.fingerprint
    assert seen[-1] == (3000, 3000)
    assert seen == sorted(seen)
    assert together.ledger == alone.ledger
    names = [
        {p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*.npy")} for d in ("1", "2")
    ]
    assert names[0] == names[1]
    assert all(
        (tmp_path / "1" / n).read_bytes() == (tmp_path / "2" / n).read_bytes() for n in names[0]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("_small_blocks")
def test_only_new_rows_are_encoded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Rows added re-encode one block; an edit that keeps size and time is noticed; a torn block is
    made again.
    """

    def encoded() -> tuple[int, Corpus]:
        counted = [0]
        corpus, _ = load_corpora(
            make(path), tokenizer, LENGTH, lambda done, total: counted.append(total)
        )
        return counted[-1], corpus

    path = many(tmp_path)
    content = Path(path).read_bytes()
    assert encoded()[0] == 6000
    assert encoded()[0] == 0
    Path(path).write_bytes(content + b'{"text": "one more"}\n' * 5)
    added, corpus = encoded()
    assert 5 <= added < 1500
    assert corpus.ledger.read == 6005
    stat = os.stat(path)
    Path(path).write_bytes(content.replace(b"drei", b"neun", 1) + b'{"text": "one more"}\n' * 5)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    edited, changed = encoded()
    assert 0 < edited < 1500
    assert changed.fingerprint != corpus.fingerprint
    for torn in list((tmp_path / "cache").rglob("*.npy"))[:2]:
        torn.write_bytes(torn.read_bytes()[:-1])
    again, repaired = encoded()
    assert 0 < again < 3000
    assert repaired.fingerprint == changed.fingerprint


def test_every_setting_that_matters_has_its_own_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two tokenizers, templates, lengths or other settings never share tokens; the same ones always
    do.
    """
    rows = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello " * 30}]]
    path = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "t.jinja").write_text(tiny.CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n"))
    variants: list[dict[str, Any]] = [
        {},
        {"template": "none"},
        {"template": str(tmp_path / "t.jinja")},
        {"too_long": "truncate_right"},
        {"train_on": ["user"]},
    ]
    prints = [load(make(path, **v), tokenizer)[0].fingerprint for v in variants for _ in range(2)]
    assert prints[::2] == prints[1::2]
    assert len(set(prints)) == len(variants)
    assert load(make(path), tokenizer, 100)[0].fingerprint not in prints
    (tmp_path / "t.jinja").write_text(tiny.CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n\n"))
    assert (
        load(make(path, template=str(tmp_path / "t.jinja")), tokenizer)[0].fingerprint not in prints
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_the_format_of_rows_has_its_own_cache(
    tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    """Rows that could be read in two ways: what one way has left in the cache is not taken for the
    other.
    """
    if name.endswith(".csv"):
        (tmp_path / name).write_text("text,prompt,completion\nwhole,half,other\n")
    else:
        write(tmp_path / name, [{"text": "whole", "prompt": "half", "completion": "other"}])
    shapes = ("text", "pairs", "text", "pairs")
    prints = [
        load(make(str(tmp_path / name), format=shape), tokenizer)[0].fingerprint for shape in shapes
    ]
    assert prints[:2] == prints[2:]
    assert prints[0] != prints[1]


@pytest.mark.parametrize("version", ["sftx.data.dataset.VERSION", "sftx.data.encoder.VERSION"])
def test_another_version_of_the_encoding_makes_blocks_anew(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    def encoded() -> int:
        counted = [0]
        load_corpora(make(path), tokenizer, LENGTH, lambda done, total: counted.append(total))
        return counted[-1]

    path = write(tmp_path / "a.jsonl", pairs(5))
    assert [encoded(), encoded()] == [5, 0]
    monkeypatch.setattr(version, "another")
    assert [encoded(), encoded()] == [5, 0]


def test_an_edited_file_that_is_converted_is_read_again(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Its name, size and time say nothing: what was once made of a .csv is found by its content."""
    path = tmp_path / "rows.csv"
    found = []
    for word in ("one", "two", "one"):
        path.write_text(f"prompt,completion\nsay it,{word}\n")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        (example,) = tokens(load(make(str(path), template="none"), tokenizer)[0])
        found.append(tokenizer.decode(example[0]))
    assert found == ["say itone<eos>", "say ittwo<eos>", "say itone<eos>"]


def test_a_tokenizer_never_gets_the_tokens_of_another(tmp_path: Path) -> None:
    """The same rows, template and settings in one cache."""
    path = write(tmp_path / "a.jsonl", pairs(3))
    prints = set()
    for kind in ("byte_level", "metaspace"):
        tokenizer = small_tokenizers.ours(kind)
        corpus, _ = load(make(path, template="none"), tokenizer)
        first, *_ = tokens(corpus)
        assert tokenizer.decode(first[0]).endswith(" 1</s>")
        prints.add(corpus.fingerprint)
    assert len(prints) == 2


BAD = [
    (b'{"prompt": "a"', "not valid JSON"),
    (b'{"prompt": "a", "completion": "\xff"}', "not UTF-8"),
    (b'{"prompt": "a", "completion": null}', "field 'completion' must be text, not null"),
    (b'{"prompt": "a", "completion": 3}', "field 'completion' must be text, not a number"),
    (b'{"prompt": "a", "completoin": "b"}', "did you mean 'completion'"),
    (
        b'{"text": "a"}',
        "field 'prompt' is missing (format pairs); found text; a file has one format, the first "
        "row's",
    ),
    (b'["a", "b"]', "expected an object with prompt and completion"),
    (b"{}", "found none"),
    (b"null", "found null"),
    (b"17", "found a number"),
    (b'{"prompt": [], "completion": "b"}', "must both be texts"),
    (b'{"prompt": "a", "completion": "\\ud83d"}', "surrogate"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_rows_are_named_or_skipped(
    tokenizer: Tokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    line: bytes,
    message: str,
) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps(row).encode() for row in pairs(12)]
    path.write_bytes(b"\n".join([*good[:6], b"", line, *good[6:], line, b""]))
    with pytest.raises(UserError) as caught:
        load(make(str(path)), tokenizer)
    assert str(caught.value).startswith(f"{path}:8: ")
    assert message in str(caught.value)
    assert "1 more bad row" in str(caught.value)
    corpus, _ = load(make(str(path), on_bad_row="skip"), tokenizer)
    assert tokens(corpus) == tokens(load(make(pairs(12)), tokenizer)[0])
    assert (corpus.ledger.read, corpus.ledger.trained, corpus.ledger.dropped) == (14, 12, 2)
    assert "14.3 % of 14 rows were dropped" in caplog.text
    write_ledger(corpus, tmp_path / "run")
    listed = [
        json.loads(text) for text in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()
    ]
    assert [(row["file"], row["line"]) for row in listed] == [(str(path), 8), (str(path), 15)]
    assert all(message in row["reason"] for row in listed)
    counts = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert counts["all"]["dropped"] == 2
    assert counts["sources"][str(path)]["read"] == 14


def test_nothing_to_train_on_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: the data set is empty"):
        load(make(str(tmp_path / "empty.jsonl")), tokenizer)
    path = write(tmp_path / "long.jsonl", [["a", "b" * 500]] * 3)
    with pytest.raises(UserError, match=r"all 3 rows were dropped; the first, .*:1: "):
        load(make(path, too_long="drop"), tokenizer)
    with pytest.raises(UserError, match="nothing to train on"):
        load(make_config(model="m", output="o", data={}), tokenizer)
    bad = write(tmp_path / "bad.jsonl", [{"text": 1}] * 3)
    with pytest.raises(UserError, match="all 3 rows were dropped"):
        load(make(bad, on_bad_row="skip"), tokenizer)


def test_detection_is_by_file_and_can_be_set(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs(3))
    write(tmp_path / "b.jsonl", [{"text": "x"}])
    corpus, _ = load(make(str(tmp_path)), tokenizer)
    assert corpus.ledger.read == 4
    path = write(tmp_path / "c.jsonl", [{"text": "x", "messages": [1]}])
    with pytest.raises(UserError, match=r"c\.jsonl:1: .*choose one with data\.format"):
        load(make(path), tokenizer)
    corpus, _ = load(make(path, format="text"), tokenizer)
    assert corpus.ledger.notes == {"column 'messages' not used": 1}
    with pytest.raises(UserError, match=r"c\.jsonl:1: messages\[0\] must be an object"):
        load(make(path, format="messages"), tokenizer)


def test_held_out_rows_never_overlap(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whole rows take a side, by content and seed; equal rows take the same; added rows move almost
    none.
    """
    rows = (
        pairs(300)
        + pairs(100)
        + [{"prompt": "long", "completion": f"{i} " * 80} for i in range(50)]
    )
    path = write(tmp_path / "a.jsonl", rows)
    train, held = load(make(path, eval_split=0.2), tokenizer)
    assert held is not None
    assert (train.ledger.read, held.ledger.read) == (450 - held.ledger.read, held.ledger.read)
    assert 90 <= held.ledger.read <= 130
    assert (train.ledger.trained + train.ledger.split, train.ledger.dropped) == (
        train.ledger.read,
        0,
    )
    lines = [set(c.line.tolist()) for c in (train, held)]
    assert not lines[0] & lines[1]
    texts = [{json.dumps(rows[line - 1]) for line in side} for side in lines]
    assert not texts[0] & texts[1]
    again, held_again = load(make(path, eval_split=0.2), tokenizer)
    assert (again.fingerprint, tokens(held_again)) == (train.fingerprint, tokens(held))
    more = write(tmp_path / "b.jsonl", pairs(10, 5000)[:5] + rows + pairs(10, 5000)[5:])
    _, held_more = load(make(more, eval_split=0.2), tokenizer)
    assert held_more is not None
    moved = {line - 5 for line in held_more.line.tolist()} ^ lines[1]
    assert len(moved) <= 15
    config = make(path, eval_split=0.2)
    _, other = load_corpora(config.model_copy(update={"seed": 1}), tokenizer, LENGTH)
    assert tokens(other) != tokens(held)
    with pytest.raises(UserError, match="both set"):
        load(make(path, eval_split=0.2, eval=path), tokenizer)
    given, held_given = load(make(path, eval_rows=pairs(3)), tokenizer)
    assert (given.ledger.read, held_given and held_given.ledger.read) == (450, 3)
    both = [
        load(make(pairs(9), eval_rows=pairs(3, 50)), tokenizer),
        load(make(pairs(9)), tokenizer),
    ]
    assert tokens(both[0][0]) == tokens(both[1][0])
    assert tokens(both[0][1]) == tokens(load(make(pairs(3, 50)), tokenizer)[0])


def test_columns_are_renamed_wherever_rows_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same corpus as under the usual names: from files, from memory, by `encode`."""
    rows = [
        {"question": row["prompt"], "answer": row["completion"], "label": False}
        for row in pairs(30)
    ]
    columns = {"question": "prompt", "answer": "completion", "label": None}
    expected = tokens(load(make(pairs(30)), tokenizer)[0])
    csv = "question,answer,label\n" + "".join(
        f"{r['question']},{r['answer']},False\n" for r in rows
    )
    (tmp_path / "a.csv").write_text(csv)
    for data in (rows, write(tmp_path / "a.jsonl", rows), str(tmp_path / "a.csv")):
        for _ in range(2):  # encoded, and from the cache
            corpus, _ = load(make(data, columns=columns), tokenizer)
            assert tokens(corpus) == expected
            assert corpus.ledger.notes == {}
        with pytest.raises(
            UserError, match=r"set data\.columns: \{question: prompt, answer: completion\}"
        ):
            load(make(data), tokenizer)
    example = sftx.encode(rows[3], tokenizer, columns=columns)[0]
    assert (example.ids.tolist(), example.weights.tolist()) == expected[3]
    with raw_tables(make(rows, columns=columns)) as [table]:
        asked = [row.phrases[0].text for _, row in read_rows(table) if isinstance(row, Row)]
    assert asked[:2] == ["0 + 1 =", "1 + 1 ="]
    with pytest.raises(UserError, match=r"data\.columns: lable: no row has a column of this name"):
        load(make(rows, columns={**columns, "lable": None}), tokenizer)
    with pytest.raises(UserError, match="a column that no format reads"):
        load(make(rows, columns={"question": "ask"}), tokenizer)
    with pytest.raises(UserError, match="a column that no format reads"):
        sftx.encode(rows[3], tokenizer, columns={"question": "ask"})


@pytest.mark.usefixtures("_small_blocks")
def test_columns_are_renamed_in_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "MIN_BLOCK", 1 << 12)
    monkeypatch.setattr(read, "MAX_BLOCK", 1 << 14)
    path, columns = (
        write(tmp_path / "a.jsonl", pairs(1500)),
        {"prompt": "completion", "completion": "prompt"},
    )
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(str(tmp_path / "tokenizer"))
    alone, _ = load(make(path, columns=columns, cache=str(tmp_path / "1")), tokenizer)
    shared, _ = load(make(path, columns=columns, cache=str(tmp_path / "2"), workers=2), tokenizer)
    assert alone.fingerprint == shared.fingerprint
    assert len({part.block.name for part in shared._parts if isinstance(part.block, Path)}) > 1


def test_weights_repeat_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    a, b = (
        write(tmp_path / "a.jsonl", pairs(20)),
        write(tmp_path / "b.jsonl", [["x", "y" * 100]] * 2 + [["u", "v"]] * 8),
    )
    sources: list[SourceSettings] = [
        {"path": a, "weight": 2.5, "name": "sums"},
        {"path": b, "weight": 1.0},
    ]
    corpus, _ = load(make_config(model="m", output="o", data={"train": sources}), tokenizer)
    lines = corpus.line[corpus.source == 0].tolist()
    assert lines == 3 * list(range(1, 21))  # the third copy is there to be shown in halves
    assert corpus.ledgers["sums"].read == 20
    assert corpus.ledgers["sums"].notes["rows in one epoch, shown 2.5 times"] == 50
    assert corpus.ledgers[b].read == 10
    with pytest.raises(UserError, match="two data sources are called"):
        load(make_config(model="m", output="o", data={"train": [a, a]}), tokenizer)


def test_weights_may_be_shares_of_the_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In every epoch alike; an epoch has as many tokens as all sources together."""
    a, b = write(tmp_path / "a.jsonl", pairs(200)), write(tmp_path / "b.jsonl", pairs(40, 1000))
    sources: list[SourceSettings] = [
        {"path": a, "weight": 1.0, "name": "large"},
        {"path": b, "weight": 3.0, "name": "small"},
    ]
    batch: BatchSettings = {"epochs": 3, "examples_per_step": 5}
    config = make_config(
        model="m", output="o", data={"train": sources, "mix_by": "tokens"}, batch=batch
    )
    corpus, _ = load(config, tokenizer)
    plan = plan_of(corpus, config)
    plain, _ = load(make_config(model="m", output="o", data={"train": sources}), tokenizer)
    once = int(plain.lengths[plain.source == 0].sum() + plain.lengths[plain.source == 1].sum() / 3)
    for epoch in range(3):
        shown = np.concatenate(
            [plan.examples(s) for s in range(plan.num_steps) if epoch < plan.epoch(s) <= epoch + 1]
        )
        counted = [
            int(corpus.lengths[shown][corpus.source[shown] == number].sum()) for number in range(2)
        ]
        assert counted[1] / sum(counted) == pytest.approx(0.75, abs=0.03)
        assert sum(counted) == pytest.approx(once, rel=0.06)


def test_a_hub_data_set_is_read_through_datasets(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(pairs(4))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus, _ = load(make("owner/name/config:test"), tokenizer)
    assert asked == [(("owner/name", "config"), {"split": "test"})]
    assert tokens(corpus) == tokens(load(make(pairs(4)), tokenizer)[0])


SHARED_CACHE = """
import sys
from sftx.data.sources import read
from sftx.data.dataset import load_corpora
from sftx.data.tokenizer import Tokenizer
from sftx.settings.make import make_config
read.MIN_BLOCK, read.MAX_BLOCK = 1 << 16, 1 << 18
config = make_config(model="m", output="o", data={"train": sys.argv[1], "workers": 0})
print(load_corpora(config, Tokenizer.load(sys.argv[2]), 64)[0].fingerprint)
"""


@pytest.mark.slow
def test_processes_share_a_cache_and_survive_a_kill(tmp_path: Path) -> None:
    path = many(tmp_path, 1500)
    folder = str(tmp_path / "tokenizer")
    tiny.tokenizer().save_pretrained(folder)

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SHARED_CACHE, path, folder], stdout=subprocess.PIPE, text=True
        )

    killed = start()
    blocks = tmp_path / "cache"
    while not any(blocks.rglob("*.npy")) and killed.poll() is None:
        pass
    killed.kill()
    killed.wait()
    processes = [start() for _ in range(4)]
    prints = {process.communicate(timeout=120)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(prints) == 1
    assert len(prints.pop().strip()) == 32


@pytest.mark.usefixtures("_small_blocks")
def test_a_process_that_dies_is_one_clear_error(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_pool.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"a process that encodes rows ended.* with code"):
        load(make(many(tmp_path, 3000), workers=2), tokenizer)


def test_reading_data_imports_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(3))
    tiny.tokenizer().save_pretrained(tmp_path / "t")
    code = (
        "import sys; from sftx.data.dataset import load_corpora; from sftx.data.tokenizer import "
        "Tokenizer;"
        "from sftx.settings.make import make_config;"
        f"c = make_config(model='m', output='o', data={{'train': {path!r}}});"
        f"print(len(load_corpora(c, Tokenizer.load({str(tmp_path / 't')!r}), 64)[0]));"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("3", 0), done.stderr


def test_example_is_public() -> None:
    assert sftx.Example is Example


def test_the_first_drop_is_named_by_its_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, text in (("a.txt", "one"), ("b.txt", ""), ("c.txt", "three")):
        (tmp_path / name).write_text(text)
    corpus, _ = load(make(str(tmp_path), on_bad_row="skip"), tokenizer)
    write_ledger(corpus, tmp_path / "run")
    [dropped] = [
        json.loads(line) for line in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()
    ]
    assert (dropped["file"], dropped["line"]) == (str(tmp_path / "b.txt"), 1)
    write(tmp_path / "b.jsonl", [{"text": 2}])
    write(tmp_path / "a.jsonl", [{"text": 1}])
    with pytest.raises(
        UserError, match=rf"all 2 rows were dropped; the first, {tmp_path}/a\.jsonl:1: field 'text'"
    ):
        load(make(str(tmp_path / "*.jsonl"), on_bad_row="skip"), tokenizer)


def test_a_row_of_great_depth_is_a_bad_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for depth in (700, 990):
        call = {"function": {"name": "f", "arguments": "[" * depth + "]" * depth}}
        messages = [
            {"role": "user", "content": "<|end|>"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        path = write(tmp_path / f"{depth}.jsonl", [{"messages": messages}])
        with pytest.raises(UserError, match=rf"{depth}\.jsonl:1: .*nested too deeply"):
            load(make(path), tokenizer)
