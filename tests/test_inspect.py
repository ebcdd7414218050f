"""What `sftx inspect` shows is what is trained on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sftx.cli import main
from sftx.cli.inspect import CPU_PACK, paint
from sftx.data.dataset import load_corpora
from sftx.data.encode_row import encode
from sftx.data.plan import Plan
from sftx.data.token_view import view
from sftx.data.tokenizer import Tokenizer
from sftx.settings.load import load_config
from sftx.settings.make import make_config
from sftx.types import Example

TOKENIZER = Tokenizer.of(tiny.tokenizer())
LONG = "a long answer that is cut, " * 8


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that name a model folder and two data files."""
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 128}')
    rows = [{"prompt": f"question {i}\n", "completion": f"antwort ü{i} 🙂"} for i in range(40)]
    rows[20]["completion"] = LONG
    rows[21]["completion"] = "</script><script>document.title = 'taken'</script>"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text('{"text": "plain"}\n\n{"segments": 1}\n')
    return [f"model={tmp_path / 'model'}", f"data.train=[{tmp_path / 'a.jsonl'}]"]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.text(min_size=1, max_size=30), st.integers(20, 200), st.booleans())
def test_texts_and_weights_are_those_of_the_example(
    prompt: str, output: str, width: int, colour: bool
) -> None:
    """The texts of a view join to the example's text, and its lines fit and hold every target."""
    example = encode([prompt, output], TOKENIZER, template="none")[0]
    shown = view(example, TOKENIZER, "here")
    assert "".join(shown.texts) == TOKENIZER.decode(shown.ids)
    assert shown.weights == example.weights.tolist()
    assert shown.targets == example.targets
    lines = [line.plain for line in paint(shown, width, colour)]
    body = "".join(line[9:] for line in lines[1:-1])
    trained = "".join(re.findall(r"⟦(?:[\d.]+:)?(.*?)⟧", body, re.DOTALL))
    if not colour and not {"⟦", "⟧"} & {*prompt, *output}:
        assert trained.endswith("<eos>")
        assert trained.count("↵") == sum(
            "\n" in t for t, w in zip(shown.texts, shown.weights, strict=True) if w
        ) + (output.count("↵"))


def test_weights_are_named_without_colour() -> None:
    ids = np.array(TOKENIZER.encode("abcdef"), np.int32)
    shown = view(Example(ids, np.array([0, 1, 1, 0, 0.5, 0.25], np.float32)), TOKENIZER, "here")
    lines = [line.plain for line in paint(shown, 80, colour=False)]
    assert lines[1] == "     0 │ a⟦bc⟧d⟦0.5:e⟧⟦0.25:f⟧"
    spans = next(
        line for line in paint(shown, 80, colour=True) if "0.5:e0.25:f" in line.plain
    ).spans
    assert len({str(span.style) for span in spans}) > 3


def read_json(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def test_rows_are_those_of_the_corpus(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row shown alone is the row as a run encodes it, at the length a run would take."""
    out = tmp_path / "out.json"
    assert main(["inspect", *run, "row=21", f"json={out}"]) == 0
    shown = read_json(out)
    corpus, _ = load_corpora(load_config(None, [*run, "output=x"]), TOKENIZER, 128)
    here = np.flatnonzero(corpus.line == 21)
    assert len(shown) == len(here) > 1
    for index, seen in zip(here, shown, strict=True):
        example = corpus.example(int(index))
        assert (seen["ids"], seen["weights"]) == (example.ids.tolist(), example.weights.tolist())
        assert seen["place"] == corpus.place(int(index))
        assert seen["note"].startswith(example.note)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'a.jsonl'}:21".replace("\n", "") in printed.replace("\n", "")
    assert (
        "a server would send: '<|user|>question 20\\n<|end|>\\n<|assistant|>'"
        in printed.replace("\n", "")
    )


def test_steps_and_packs_are_those_of_the_plan(run: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = [*run, "batch.examples_per_step=8", "runtime.tokens_per_pack=150"]
    config = load_config(None, [*arguments, "output=x"])
    corpus, _ = load_corpora(config, TOKENIZER, 128)
    packs = Plan(corpus.lengths, corpus.weights, config.batch, config.seed).packs(1, 150)[
        0
    ]  # the second step
    assert main(["inspect", *arguments, "step=2", f"json={out}"]) == 0
    assert [r["ids"] for r in read_json(out)] == [
        corpus.example(i).ids.tolist() for pack in packs for i in pack
    ]
    assert main(["inspect", *arguments, "step=2", "pack=1", f"json={out}"]) == 0
    of_the_second = read_json(out)
    assert [r["ids"] for r in of_the_second] == [corpus.example(i).ids.tolist() for i in packs[1]]
    arguments = [*arguments[:-1], f"output={tmp_path}"]  # where a run says what its packs were
    (tmp_path / "run.json").write_text('{"tokens_per_pack": 150}')
    assert main(["inspect", *arguments, "step=2", "pack=1", f"json={out}"]) == 0
    assert read_json(out) == of_the_second


def test_what_is_not_there_is_said(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*run[:1], f"data={tmp_path / '[ab].jsonl'}"]
    for arguments, message in (
        ([*run, "row=41"], "a.jsonl:41: there is no row here"),
        ([*run, "row=x"], "expected a whole number"),
        ([*run, "row=c.jsonl:1"], "no file called 'c.jsonl'"),
        ([*run, "step=99"], "the run has 3 steps"),
        ([*run, "step=1", "row=1"], "name one of them"),
        ([*run, "pack=1"], "pack= needs step="),
        ([*more, f"row={tmp_path / 'b.jsonl'}:2"], "b.jsonl:2: there is no row here"),
        ([*more, f"row={tmp_path / 'b.jsonl'}:3"], "field 'text' is missing"),
    ):
        assert main(["inspect", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err.replace("\n", "")
    assert main(["inspect", *more, f"row={tmp_path / 'b.jsonl'}:1"]) == 0


def test_the_page_stands_alone_and_holds_no_foreign_code(run: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", *run, "row=1", f"html={page}"]) == 0
    text = page.read_text(encoding="utf-8")
    facts = pages.data_of(text)
    corpus, _ = load_corpora(load_config(None, [*run, "output=x"]), TOKENIZER, 128)
    assert facts["examples"] == len(corpus) == len(facts["rows"])
    assert sum(facts["lengths"]["counts"]) == len(corpus)
    assert sum(facts["steps"]["targets"]) == corpus.targets.sum()
    by_place = {(r["place"], r["part"]): r for r in facts["rows"]}
    for index in range(len(corpus)):
        row, example = by_place[corpus.place(index), int(corpus.part[index])], corpus.example(index)
        ends = [start for start, _ in row["runs"][1:]] + [len(example.ids)]
        weights = [
            w for (start, w), end in zip(row["runs"], ends, strict=True) for _ in range(end - start)
        ]
        assert (row["ids"], weights) == (example.ids.tolist(), example.weights.tolist())
    assert [row["place"] for row in facts["rows"] if "split" in row["note"]]


def test_no_torch(run: list[str]) -> None:
    code = (
        "import sys; from sftx.cli import main; assert main(sys.argv[1:]) == 0;"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", *run, "step=1"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_every_row_is_found_by_its_place(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "texts", tmp_path / "out.json"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text(f"the text of {name}")
    arguments = ["inspect", run[0], f"data={folder}"]
    assert main([*arguments, f"row={folder / 'b.txt'}:1", f"json={out}"]) == 0
    assert [(shown["place"], "".join(shown["texts"])) for shown in read_json(out)] == [
        (str(folder / "b.txt"), "the text of b.txt<eos>")
    ]
    capsys.readouterr()
    for wrong, message in (
        ([*arguments, "row=4"], "texts, row 4: there is no row here"),
        ([*arguments, "row=0"], "sftx inspect: row='0': expected a whole number of at least 1"),
        ([*arguments, "rows=0"], "sftx inspect: rows='0': expected a whole number of at least 1"),
        (["inspect", run[0], "data.max_length=9"], "data.train: nothing to train on is given"),
    ):
        assert main(wrong) == 2, wrong
        assert message in capsys.readouterr().err.replace("\n", "")


def test_data_commands_no_terminal() -> None:
    shown = view(encode("a\x1b]0;b\x07c\x9b1m", TOKENIZER, template="none")[0], TOKENIZER, "here")
    text = "".join(line.plain for colour in (True, False) for line in paint(shown, 80, colour))
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", text)


def test_the_page_names_the_place_of_a_dropped_row(run: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["good", {"text": 1}, "good"]')
    page, skip = tmp_path / "page.html", "data.on_bad_row=skip"
    assert (
        main(["inspect", run[0], f"data={tmp_path / 'a.json'}", skip, "rows=1", f"html={page}"])
        == 0
    )
    dropped = pages.data_of(page.read_text(encoding="utf-8"))["dropped"]
    assert [row["place"] for row in dropped] == [f"{tmp_path / 'a.json'}, row 2"]


# --- special tokens that are only spelled ---------------------------------------------------------


def test_a_spelled_special_token_is_told_from_the_token() -> None:
    """The row's own `<eos>` is five letters here, and the one at the end is the token."""
    example = encode("a<eos>b", TOKENIZER)[0]
    shown = view(example, TOKENIZER, "here")
    assert (
        "".join(text for text, spelled in zip(shown.texts, shown.spelled, strict=True) if spelled)
        == "<eos>"
    )
    assert sum(shown.special) == 1
    plain = [line.plain for line in paint(shown, 80, colour=False)]
    assert plain[1] == r"     0 │ a⟦\<eos>b<eos>⟧"
    assert r"\ = text that spells a special token (data.special_tokens: escape)" in plain[-1]
    coloured = [line.plain for line in paint(shown, 80, colour=True)]
    assert coloured[1].endswith(r"a\<eos>b<eos>")
    allowed = view(encode("a<eos>b", TOKENIZER, special_tokens="allow")[0], TOKENIZER, "here")
    assert not any(allowed.spelled)
    assert [line.plain for line in paint(allowed, 80, colour=False)][1:] == [
        "     0 │ a⟦<eos>b<eos>⟧",
        "         4 tokens, 3 targets (75.0 %)",
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "<eos>", "<", "eos>", "<|user|>", "é", "🙂"]), min_size=1, max_size=8
    )
)
def test_what_is_marked_as_spelled_is_what_the_tokenizer_would_take_for_tokens(
    parts: list[str],
) -> None:
    text = "x" + "".join(parts) + "y"
    shown = view(encode(text, TOKENIZER)[0], TOKENIZER, "here")
    marked = re.sub(r"0+", "0", "".join(str(int(spelled)) for spelled in shown.spelled))
    would_be = [i for i in TOKENIZER.encode(text) if i in TOKENIZER.control_ids]
    letters = sum(len(TOKENIZER.decode([i])) for i in would_be)
    assert marked.count("1") == letters


@pytest.mark.parametrize(
    ("row", "settings", "noted"),
    [
        ({"text": "a<eos>b"}, {}, True),
        ({"text": "<bos>ab<eos>"}, {}, False),  # at its ends it is the token
        ({"text": "<bos>a<bos>b"}, {}, True),
        ({"text": "a<eos>b"}, {"special_tokens": "allow"}, False),
        ({"text": "a< eos>b"}, {}, False),
        ({"prompt": "a<|user|>", "completion": "b"}, {"template": "none"}, True),
        ({"prompt": "a", "completion": "b<eos>"}, {"template": "none"}, False),
        ({"prompt": "a<eos>", "completion": "b"}, {"template": "none"}, True),
        ({"prompt": "a", "completion": "b<eos>c"}, {"template": "auto"}, True),
        ({"segments": [{"text": "a<eos>", "weight": 0}, {"text": "b", "weight": 1}]}, {}, True),
        ({"messages": [{"role": "user", "content": "<eos>"},
                       {"role": "assistant", "content": "b"}]},
         {"template": "none"}, True),
    ],
)  # fmt: skip
def test_the_ledger_counts_rows_with_spelled_special_tokens(
    row: dict[str, Any], settings: dict[str, Any], noted: bool, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    tiny.tokenizer().save_pretrained(model)
    data = {"rows": [row, row], "workers": 0, "cache": str(tmp_path / "cache"), **settings}
    sections: dict[str, Any] = {"data": data}
    config = make_config(model=str(model), output=str(tmp_path / "out"), **sections)
    corpus, _ = load_corpora(config, Tokenizer.load(str(model)), 64)
    assert corpus.ledger.notes.get("special tokens kept as text", 0) == (2 if noted else 0)


# --- shared prefixes ------------------------------------------------------------------------------


def test_a_step_shows_shared_prefixes_once_with_their_branches_indented(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "the same long question to all of them"
    rows = [{"prompt": prompt, "completion": f"{i} is an answer"} for i in range(4)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    arguments = [run[0], f"data={tmp_path / 'c.jsonl'}", "step=1"]
    assert main(["inspect", *arguments, f"json={out}", f"html={page}"]) == 0
    root, *branches = read_json(out)
    assert (root["depth"], root["start"], root["examples"]) == (0, 0, 4)
    assert "".join(root["texts"]) == f"<|user|>{prompt}<|end|>\n<|assistant|>"
    assert len(branches) == 4
    corpus, _ = load_corpora(load_config(None, [*arguments[:2], "output=x"]), TOKENIZER, 128)
    whole = sorted(corpus.example(i).ids.tolist() for i in range(4))
    assert sorted(root["ids"] + branch["ids"] for branch in branches) == whole
    assert {(b["depth"], b["start"], b["examples"]) for b in branches} == {(1, len(root["ids"]), 1)}
    shown = capsys.readouterr().out
    assert f"\n    {len(root['ids']):6d} │ " in shown
    shown = " ".join(shown.split())
    assert "4 examples begin alike" in shown
    assert f"; shared prefixes are computed once, {sum(map(len, whole))} tokens without" in shown
    assert [row["depth"] for row in pages.data_of(page.read_text())["rows"]][:5] == [0, 1, 1, 1, 1]
    assert main(["inspect", *arguments, "runtime.share_prefixes=off", f"json={out}"]) == 0
    assert sorted(row["ids"] for row in read_json(out)) == whole


def test_a_tree_that_needs_a_larger_pack_is_shown_whole(run: list[str], tmp_path: Path) -> None:
    """As the run will take it, where none has said yet how large its packs are."""
    story = "once upon a time there was a story. " * 40
    rows = [{"prompt": story, "completion": f"{i} is an answer"} for i in range(8)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.json"
    batch = ["batch.examples_per_step=8", "data.max_length=4096"]
    arguments = [run[0], f"data={tmp_path / 'c.jsonl'}", "step=1", *batch]
    assert main(["inspect", *arguments, f"json={out}"]) == 0
    root, *branches = read_json(out)
    assert len(root["ids"]) > CPU_PACK
    assert (root["examples"], len(branches)) == (8, 8)
    assert main(["inspect", *arguments, "runtime.tokens_per_pack=1024", f"json={out}"]) == 0
    assert len(read_json(out)) == 8
