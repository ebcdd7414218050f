"""Checks 24 to 27: what a run does with bad rows, empty data, foreign ids and a cache that has seen
other data.
"""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import load_file, save_file

from scorecard import good_rows
from scorecard.frame import check, expect
from scorecard.runs import on_call, records, run, settings, write_rows
from sftx.data.dataset import load_corpora
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.settings.make import make_config
from sftx.training import build
from sftx.types import UserError

SYSTEM = {"role": "system", "content": "s"}
IMAGE = {"role": "user", "content": [{"type": "image", "url": "file:///secret"}]}
MALFORMED: list[tuple[str, str, str]] = [  # format, the bad line, what the message must hold
    ("pairs", '{"prompt": "x", "completion": "y"', "not valid JSON.*column 34"),
    (
        "pairs",
        '{"prompt": "half a ro',
        "not valid JSON: Unterminated string at column 12; the line is cut off",
    ),
    ("pairs", "not json", "not valid JSON.*column 1"),
    ("pairs", '{"prompt": "\udcff\udcfe", "completion": "c"}', "not UTF-8.*0xff at column 13"),
    ("pairs", '{"prompt": "p", "completion": 7}', "'completion'.*text.*number"),
    ("pairs", '{"prompt": "p", "completion": null}', "'completion'.*text.*null"),
    ("pairs", '{"prompt": "p"}', "'completion' is missing"),
    ("pairs", '{"promt": "p", "completion": "c"}', "'prompt' is missing.*did you mean"),
    ("pairs", "{}", "'prompt' is missing"),
    ("pairs", "17", "expected an object.*number"),
    ("pairs", r'{"prompt": "a\ud800b", "completion": "c"}', "'prompt'.*surrogate"),
    ("messages", '{"messages": []}', "'messages'.*not empty"),
    (
        "messages",
        json.dumps({"messages": [good_rows.USER, {"role": "assistant", "content": None}]}),
        r"messages\[1\].content",
    ),
    (
        "messages",
        json.dumps({"messages": [good_rows.USER, {"role": "asistant", "content": "a"}]}),
        "did you mean 'assistant'",
    ),
    (
        "messages",
        json.dumps({"messages": [good_rows.USER, {"content": "a"}]}),
        r"messages\[1\].*role",
    ),
    ("messages", json.dumps({"messages": [SYSTEM, good_rows.USER]}), "no turn carries weight"),
    (
        "messages",
        json.dumps({"messages": [IMAGE, good_rows.ANSWER]}),
        r"messages\[0\].content\[0\].*'image'",
    ),
    ("dialogue", '["a", "b", "c"]', "3 phrases, an odd number"),
    ("tokens", '{"input_ids": [5, 6, 7], "labels": [5, 6]}', r"'labels'.*\(3\), found 2"),
    ("segments", '{"segments": [{"text": "a", "weight": NaN}]}', r"segments\[0\].weight.*nan"),
]
FUZZED = {
    "rows": 2200,
    "files": 3500,
    "templates": 2500,
}  # examples; one of rows holds several rows


class Reader:
    """Encodes rows as a run does, with one cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny.tokenizer().save_pretrained(folder / "tokenizer")

    def read(self, path: str, **data: Any) -> Corpus:
        """The corpus of a file."""
        tokenizer = Tokenizer.load(str(self.folder / "tokenizer"))
        given: Any = {"train": path, "cache": str(self.folder / "cache"), "workers": 0, **data}
        length = given.get("max_length", 128)
        return load_corpora(
            make_config(model="unused", data=given, output="unused"), tokenizer, length
        )[0]

    def refusal(self, path: str, **data: Any) -> str:
        """The message with which a file is refused; empty if it is not."""
        try:
            self.read(path, **data)
        except UserError as error:
            return str(error)
        return ""


@check(24, "20 malformed rows", limit=420)
def malformed(folder: Path) -> str:
    """Every message has file, 1-based line, field and reason, before the model loads; skipped rows
    are counted.

    So it is at line 120,000 of 30 MB too. Fuzzing: 10,000 and more broken rows, files and templates
    give a clear error or a counted skip.
    """
    reader = Reader(folder)
    for number, (form, bad, expected) in enumerate(MALFORMED):
        good, path = json.dumps(good_rows.GOOD[form]), folder / f"{number}.jsonl"
        path.write_bytes("\n".join([good, good, "", bad, good]).encode("utf-8", "surrogateescape"))
        message = reader.refusal(str(path))
        where = f"{path}:4: "
        expect(
            message.startswith(where) and re.search(expected, message),
            f"{bad[:60]!r} is refused with {message!r}",
        )
        ledger = reader.read(str(path), on_bad_row="skip").ledger
        expect((ledger.read, ledger.dropped) == (4, 1), f"{bad[:60]!r} skipped: {ledger.summary()}")
    path = folder / "big.jsonl"
    row = json.dumps({"prompt": "p" * 100, "completion": "c" * 120})
    path.write_text((row + "\n") * 119_999 + '{"prompt": "p"}\n' + (row + "\n") * 100)
    expect(path.stat().st_size > 30e6, "the big file is too small")
    message = reader.refusal(str(path))
    expect(message.startswith(f"{path}:120000: "), f"in a big file: {message[:200]}")
    config = settings(folder, data={"train": str(folder / "4.jsonl")})
    text = run(config, lambda: on_call(build, "load_model", lambda: print("MODEL LOADED")), code=2)
    expect(
        "MODEL LOADED" not in text and "4.jsonl:4: " in text and "Traceback" not in text,
        text[-300:],
    )
    missing = (
        "rows are named; fuzzing them was not tried: hypothesis is not installed (pip "
        "install 'sftx[dev]')"
    )
    expect(find_spec("hypothesis"), missing)
    from scorecard import fuzz  # the one check that needs more than sftx itself

    tried = {name: getattr(fuzz, name)(folder, examples) for name, examples in FUZZED.items()}
    expect(sum(tried.values()) >= 10_000, f"only {tried} were tried")
    told = ", ".join(f"{count:,} {name}" for name, count in tried.items())
    return f"{len(MALFORMED)} of {len(MALFORMED)} named, line 120,000 too; fuzzed: {told}"


@check(25, "Empty / all-dropped / fully masked", limit=60, quick=True)
def nothing_to_learn(folder: Path) -> str:
    """Counts are always told, over 1 % dropped warns, 100 % is an error, and no step ever reports a
    loss of 0.
    """
    reader = Reader(folder)
    masked, good = (
        {"input_ids": [5, 6, 7], "labels": [-100] * 3},
        {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]},
    )
    empty, all_masked = (
        write_rows(folder / "empty.jsonl", []),
        write_rows(folder / "masked.jsonl", [masked] * 3),
    )
    long = write_rows(folder / "long.jsonl", [{"prompt": "p" * 200, "completion": "c"}] * 3)
    for path, data, expected in (
        (empty, {}, "the data set is empty"),
        (all_masked, {}, r"no token to learn|all 3 rows were dropped"),
        (all_masked, {"on_bad_row": "skip"}, "all 3 rows were dropped"),
        (long, {"too_long": "drop"}, "all 3 rows were dropped"),
    ):
        message = reader.refusal(path, **data)
        expect(re.search(expected, message), f"{Path(path).name}: {message!r}")
    some = write_rows(folder / "some.jsonl", [*[good] * 20, masked])
    config = settings(
        folder,
        data={"train": some, "on_bad_row": "skip"},
        batch={"examples_per_step": 1, "steps": 42},
    )
    text = run(config)
    expect("read 21 rows = trained 20 + split 0 + dropped 1" in text, f"counts: {text[:300]}")
    expect(
        re.search(r"warning: .*4\.8 % of 21 rows were dropped", text), f"no warning: {text[:300]}"
    )
    lines = records(config)
    expect(
        all(line["loss"] and line["targets"] == 2 for line in lines),
        "a step without targets, or with a loss of 0",
    )
    return (
        "4 of 4 refused with counts, 4.8 % dropped warned of, 42 of 42 steps have targets and "
        "a loss"
    )


@check(26, "Ids and labels", limit=120)
def ids(folder: Path) -> str:
    """Refused before step 1: ids and labels the model does not have, lengths it cannot hold,
    weights that are not numbers. Every untruncated answer ends in a stop token, and a prompt begins
    with one BOS.
    """

    def tokens(ids: list[int], labels: list[int], form: str = "tokens") -> dict[str, Any]:
        path = write_rows(
            folder / f"{len(list(folder.iterdir()))}.jsonl", [{"input_ids": ids, "labels": labels}]
        )
        return {"data": {"train": path, "format": form}}

    small, broken = tiny.folder(folder / "small", vocab_size=200), tiny.folder(folder / "broken")
    weights = load_file(folder / "broken" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "broken" / "model.safetensors", {"format": "pt"})
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "id 300": (tokens([5, 300, 2], [-100, 300, 2]), "300.*outside the vocabulary"),
        "id -1": (tokens([5, -1, 2], [-100, -1, 2]), "'input_ids' holds -1"),
        "label 300": (tokens([5, 6, 2], [-100, 300, 2]), r"labels\[1\] is 300"),
        "tokenizer larger than model": (
            {"model": {"path": small}},
            "outside the vocabulary of the model",
        ),
        "positions": ({"data": {"max_length": 300}}, "256 positions"),
        "max_length 1": ({"data": {"max_length": 1}}, "data.max_length"),
        "NaN weight": ({"model": {"path": broken}}, "not finite before training"),
        "no stop token": (tokens([5, 6, 7], [-100, 6, 7], "auto"), "never learn to stop"),
    }
    for name, (changes, expected) in cases.items():
        text = run(settings(folder, dropout=0.0, **changes), code=2)
        expect(
            re.search(expected, text) and not records(settings(folder)), f"{name}: {text[-300:]}"
        )
    reader = Reader(folder)
    config = settings(folder, dropout=0.0)
    corpus = reader.read(config["data"]["train"])
    ends = [
        int(corpus.example(i).ids[corpus.example(i).weights > 0][-1]) for i in range(len(corpus))
    ]
    expect(set(ends) == {tiny.SPECIAL.index("<|end|>")}, f"answers end in {set(ends)}")
    template = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
    (folder / "bos.jinja").write_text(template)
    first = (
        reader.read(config["data"]["train"], template=str(folder / "bos.jinja"))
        .example(0)
        .ids.tolist()
    )
    expect(first.count(1) == 1 and first[0] == 1, f"BOS: {first[:4]}")
    return (
        f"{len(cases)} of {len(cases)} refused, {len(ends)} answers end in the stop token, one BOS"
    )


@check(27, "Cache staleness", limit=60, quick=True)
def stale(folder: Path) -> str:
    """A file or template changed, its size and time kept, another length or mask: noticed; nothing
    else is redone.
    """
    reader, path, template = Reader(folder), folder / "rows.jsonl", folder / "turns.jinja"
    template.write_text(tiny.CHAT_TEMPLATE)

    def write(word: str) -> None:
        write_rows(path, [{"prompt": f"{word} {i:03}", "completion": "answer"} for i in range(60)])
        os.utime(path, (1_700_000_000, 1_700_000_000))

    def text(**data: Any) -> str:
        corpus = reader.read(str(path), template=str(template), **data)
        return str(tiny.tokenizer().decode(corpus.example(0).ids))

    def blocks() -> int:
        return len(list((folder / "cache").glob("??/*.npy")))

    write("old")
    first, one = text(), blocks()
    expect(
        "old 000" in first and text() == first and blocks() == one,
        "the same data was encoded twice",
    )
    write("new")
    expect("new 000" in text(), "a file with the same size and time was not read again")
    template.write_text(tiny.CHAT_TEMPLATE.replace("<|end|>", "<|tool|>"))
    os.utime(template, (1_700_000_000, 1_700_000_000))
    expect("<|tool|>" in text(), "a changed template file was not noticed")
    expect(
        len(text(max_length=15, too_long="truncate_left")) < len(text()),
        "another max_length was not noticed",
    )
    lengths = [int(reader.read(str(path), train_on=on).targets.sum()) for on in ("all", ["user"])]
    expect(lengths[0] != lengths[1], "another train_on was not noticed")
    write("old")
    before = blocks()
    text()
    expect(blocks() == before + 1, "the old rows under the new template are one new block")
    return f"4 of 4 edits noticed, equal data read from the cache ({blocks()} blocks)"
