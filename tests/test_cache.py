"""The cache: what is read is what was written, or nothing; never something else."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sftx.data.dataset import load_corpora
from sftx.data.encoder import Encoded
from sftx.data.store.block import Facts, make_block, open_block
from sftx.data.store.cache import Cache
from sftx.data.tokenizer import Tokenizer
from sftx.settings.keywords import DataSettings
from sftx.settings.make import make_config
from sftx.types import Example, UserError


def example(ids: list[int], weights: list[float], note: str = "", part: int = 0) -> Example:
    return Example(np.array(ids, np.int32), np.array(weights, np.float32), note, part)


def same(a: Example, b: Example) -> bool:
    return (
        a.ids.tolist() == b.ids.tolist()
        and a.weights.tolist() == b.weights.tolist()
        and a.weights.dtype == np.float32
        and (a.note, a.part) == (b.note, b.part)
    )


EXAMPLES = [
    example([1, 2, 3], [0, 1, 1]),
    example([4], [0], "split 1 of 2"),
    example([5, 6], [0, 1], "split 2 of 2", 1),
]

WEIGHT = st.sampled_from([0.0, 1.0]) | st.floats(0, 1000, width=32)
SEQUENCE = st.lists(st.tuples(st.integers(0, 2**31 - 1), WEIGHT), max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.lists(SEQUENCE, max_size=8))
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, sequences: list
) -> None:
    cache = Cache(str(tmp_path_factory.mktemp("cache")))
    written = [
        example([i for i, _ in s], [w for _, w in s], f"note {len(s)}", len(s)) for s in sequences
    ]
    cache.save("ab12", make_block([(i, i, Encoded([e])) for i, e in enumerate(written)]))
    block = cache.load("ab12")
    assert block is not None
    assert len(block.table) == len(written)
    assert all(same(block.example(block.table[i]), e) for i, e in enumerate(written))
    assert block.table["weight"].tolist() == [
        float(e.weights.sum(dtype=np.float64)) for e in written
    ]


def test_blocks_are_arrays_of_numpy(tmp_path: Path) -> None:
    """The files can be opened by other tools; weights of 0 and 1 take a byte."""
    cache = Cache(str(tmp_path))
    cache.save("k1", make_block([(0, 0, Encoded([e])) for e in EXAMPLES]))
    with cache.path("k1").open("rb") as file:
        table, ids, weights = (np.load(file) for _ in range(3))
    assert ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert weights.dtype == np.uint8
    assert table["start"].tolist() == [0, 3, 4]
    cache.save("k2", make_block([(0, 0, Encoded([example([1, 2], [0, 0.5])]))]))
    with cache.path("k2").open("rb") as file:
        table, ids, weights = (np.load(file) for _ in range(3))
    assert weights.dtype == np.float32


def test_a_torn_file_is_no_block(tmp_path: Path) -> None:
    """Cut anywhere, a file is taken for absent, so its rows are encoded again."""
    cache = Cache(str(tmp_path))
    cache.save("k1", make_block([(0, 0, Encoded([e])) for e in EXAMPLES]))
    path = cache.path("k1")
    whole = path.read_bytes()
    for size in reversed(range(len(whole))):
        os.truncate(path, size)
        assert open_block(path) is None, size
    path.write_bytes(whole)
    assert open_block(path) is not None
    assert open_block(tmp_path / "nothing") is None


def test_a_block_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a loss of power could leave a file that is named as a block and holds nothing."""
    synced: dict[int, int] = {}
    named: list[tuple[int, int]] = []
    sync, replace = os.fsync, os.replace

    def watched_sync(descriptor: int) -> None:
        sync(descriptor)
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    def watched_replace(source: str, target: Path) -> None:
        found = os.stat(source)
        named.append((synced.get(found.st_ino, -1), found.st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    cache = Cache(str(tmp_path))
    cache.save("k1", make_block([(0, 0, Encoded([e])) for e in EXAMPLES]))
    size = cache.path("k1").stat().st_size
    assert named == [(size, size)]


def test_changed_tokens_are_noticed(tmp_path: Path) -> None:
    """Every bit of every token and weight is under the hash of its example."""
    cache = Cache(str(tmp_path))
    cache.save("k1", make_block([(0, 0, Encoded([e])) for e in EXAMPLES]))
    path = cache.path("k1")
    whole = bytearray(path.read_bytes())
    block = open_block(path)
    assert block is not None
    at = whole.find(np.array([1, 2, 3, 4, 5, 6], np.int32).tobytes())
    weights_at = whole.find(bytes([0, 1, 1, 0, 0, 1]))
    assert min(at, weights_at) > 0
    for place in [*range(at, at + 24), *range(weights_at, weights_at + 6)]:
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.unlink()
        path.write_bytes(damaged)
        broken = open_block(path)
        assert broken is not None
        with pytest.raises(UserError, match="damaged"):
            [broken.example(entry) for entry in broken.table]


def test_every_bit_but_those_of_tokens_is_checked_when_a_block_is_opened(tmp_path: Path) -> None:
    """One bit changed anywhere: the file is no block, or says the same, or its examples are found
    to be damaged.
    """
    cache = Cache(str(tmp_path))
    facts = Facts(dropped=[(7, "too long")], unused=Counter(id=3))
    cache.save("k1", make_block([(i, i, Encoded([e])) for i, e in enumerate(EXAMPLES)], facts))
    path = cache.path("k1")
    whole = path.read_bytes()
    good = open_block(path)
    assert good is not None
    expected = good.table.tolist()
    found = {"no block": 0, "damaged example": 0, "the same": 0}
    for place in range(len(whole)):
        for bit in (0, 5):
            with path.open("r+b") as file:
                file.write(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            block = open_block(path)
            if block is None:
                found["no block"] += 1
                continue
            assert block.facts == good.facts
            assert block.table.tolist() == expected, (place, bit)
            try:
                assert all(same(block.example(block.table[i]), e) for i, e in enumerate(EXAMPLES))
                found["the same"] += 1
            except UserError:
                found["damaged example"] += 1
    assert found["damaged example"] == 2 * (6 * 4 + 6)  # the bytes of tokens and weights
    assert found["no block"] > 2 * 1000 > 50 > found["the same"]  # white space behind the header


def test_a_damaged_note_about_a_file_is_written_again(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    path = cache.path("n1", ".blocks")
    note = {"blocks": [[0, 10, 1, 2, "ab"]], "form": "text"}
    cache.write_note(path, note)
    whole = path.read_bytes()
    assert cache.read_note(path) == note
    for place in range(len(whole)):
        for bit in (0, 5):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            assert cache.read_note(path) is None, (place, bit)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert cache.read_note(path) is None
    assert cache.read_note(tmp_path / "nothing") is None


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that this process may read but not write, whoever runs the tests."""
    everything = [folder, *folder.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for path in everything:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that every user may reach, as that of a test is not."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_whole_cache_may_be_read_only(shared_folder: Path) -> None:
    """A run whose rows are all encoded needs to write nothing; one that lacks some says where it
    could not.
    """
    tokenizer = Tokenizer.of(tiny.tokenizer())
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(20)]
    (shared_folder / "a.csv").write_text(
        "prompt,completion\n" + "".join(",".join(r.values()) + "\n" for r in rows)
    )
    (shared_folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    data: DataSettings = {
        "train": [str(shared_folder / "a.csv"), str(shared_folder / "b.jsonl")],
        "workers": 0,
    }
    config = make_config(
        model="m", output="o", data={**data, "cache": str(shared_folder / "cache")}
    )
    written, _ = load_corpora(config, tokenizer, 64)
    with read_only(shared_folder):
        corpus, _ = load_corpora(config, tokenizer, 64)
        assert corpus.fingerprint == written.fingerprint
        assert corpus.example(3).ids.tolist() == written.example(3).ids.tolist()
        with pytest.raises(
            UserError, match=r"the token cache cannot be written .* set data\.cache"
        ):
            load_corpora(config, tokenizer, 32)
    (shared_folder / "cache" / "tmp").rmdir()
    with read_only(shared_folder):
        assert load_corpora(config, tokenizer, 64)[0].fingerprint == written.fingerprint


def test_debris_goes_and_live_files_stay(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    old, new = tmp_path / "tmp" / "old", tmp_path / "tmp" / "new"
    old.mkdir()
    (old / "rows.jsonl").write_text("1")
    new.write_text("1")
    long_ago = time.time() - 10**6
    os.utime(old, (long_ago, long_ago))
    with cache.scratch() as folder:
        assert folder.is_dir()
    assert not old.exists()
    assert new.exists()
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"set data\.cache"):
        Cache(str(tmp_path / "file"))


def test_corpus_of_examples() -> None:
    corpus = tiny.corpus(EXAMPLES)
    assert len(corpus) == 3
    assert all(same(corpus.example(i), e) for i, e in enumerate(EXAMPLES))
    assert corpus.lengths.tolist() == [3, 1, 2]
    assert corpus.weights.tolist() == [2.0, 0.0, 1.0]
    assert corpus.targets.tolist() == [2, 0, 1]
    assert (corpus.lengths.dtype, corpus.weights.dtype, corpus.targets.dtype) == (
        np.int32,
        np.float64,
        np.int32,
    )
    assert (corpus.source.dtype, corpus.line.dtype, corpus.part.dtype) == (
        np.int16,
        np.int64,
        np.int32,
    )
    assert corpus.largest_id == 6
    assert corpus.place(1) == "memory, row 2"


def test_fingerprint_is_of_tokens_weights_and_order() -> None:
    base = tiny.corpus(EXAMPLES)
    assert base.subset([0, 1, 2]).fingerprint == base.fingerprint
    assert (
        tiny.corpus(EXAMPLES[::-1]).fingerprint
        == base.subset([2, 1, 0]).fingerprint
        != base.fingerprint
    )
    changed = [example([1, 2, 3], [0, 1, 0.5]), *EXAMPLES[1:]]
    moved = [example([1, 2, 3, 4], [0, 1, 1, 0]), *EXAMPLES[2:]]
    assert len({tiny.corpus(e).fingerprint for e in (EXAMPLES, changed, moved)}) == 3


def test_subset_repeats_and_divides() -> None:
    corpus = tiny.corpus(EXAMPLES)
    twice = corpus.subset([2, 2, 0])
    assert [twice.example(i).ids.tolist() for i in range(3)] == [[5, 6], [5, 6], [1, 2, 3]]
    rest, held = corpus.divide(np.array([True, False, False]))
    assert (len(rest), len(held)) == (2, 1)
    assert (rest.ledger.read, rest.ledger.tokens) == (1, 3)
    assert (held.ledger.read, held.ledger.tokens) == (1, 3)


def test_an_empty_corpus_keeps_its_dtypes() -> None:
    empty = tiny.corpus([])
    assert len(empty) == 0
    assert empty.lengths.dtype == np.int32
    assert empty.weights.dtype == np.float64
    assert empty.ledger.read == 0
