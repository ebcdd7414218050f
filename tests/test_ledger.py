"""The ledger: what was not read, what was shown, what stands behind a shortened prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from sftx.data.corpus import Corpus
from sftx.data.encode import load_corpora
from sftx.data.tokenizer import Tokenizer
from sftx.settings import make_config

USER, MODEL = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.of(tiny.tokenizer())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))


def load(tokenizer: Tokenizer, length: int = 64, **data: Any) -> Corpus:
    return load_corpora(make_config(model="m", output="o", data={"workers": 0, **data}), tokenizer, length)[0]


def test_fields_of_messages_that_nobody_here_knows_are_counted(tokenizer: Tokenizer) -> None:
    rows = [{"messages": [USER, {**MODEL, "id": str(i), "source": "x" if i else None}]} for i in range(3)]
    assert load(tokenizer, rows=rows).ledger.notes == {
        "message field 'id' left to the template": 3,
        "message field 'source' left to the template": 2,
    }


def test_a_message_that_another_tool_would_not_train_is_not_trained(tokenizer: Tokenizer) -> None:
    talk = [USER, {**MODEL, "content": "bad", "loss": False}, USER, {**MODEL, "content": "good"}]
    corpus = load(tokenizer, rows=[{"messages": talk}])
    example = corpus.example(0)
    assert tokenizer.decode(example.ids[example.weights > 0].tolist()) == "good<|end|>"
