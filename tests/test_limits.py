"""Hangs and balloons: time and memory grow with the size of the input, or a limit is named."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tokenizers import ours

from sftx.data import oversize
from sftx.data.chat.limits import watched
from sftx.data.chat.sandbox import TEMPLATE_ERRORS, compile_template, run_template
from sftx.data.encoder import Encoder
from sftx.data.sources.formats import detect
from sftx.data.sources.rows import parse
from sftx.data.store import word_cache
from sftx.data.store.encode_worker import encode_block
from sftx.data.truncation import TokenSequence, fit
from sftx.settings.load import load_config
from sftx.settings.schema import Data
from sftx.types import RowError, UserError


def seconds(act: Callable[[], Any]) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


def refusal(kind: type[Exception], act: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


MANY = {f"key{i}": i for i in range(100_000)}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("form", ["", "text", "pairs", "messages", "sharegpt", "alpaca", "tokens"])
def test_a_row_of_100_000_keys_is_refused_at_once(form: str) -> None:
    row = {
        **MANY,
        "text": "t",
        "prompt": "p",
        "completion": "c",
        "instruction": "i",
        "output": "o",
        "input_ids": [3],
    }
    act = (lambda: parse(row, form)) if form else (lambda: detect(MANY))
    said: list[str] = []
    assert seconds(lambda: said.append(refusal(RowError, act))) < 1
    assert "columns, at most 1,000 are read" in said[0]
    assert len(said[0]) < 200


def test_a_message_of_100_000_keys_is_refused_at_once() -> None:
    row = {"messages": [{**MANY, "role": "user", "content": "x"}, ANSWER]}
    said: list[str] = []
    assert seconds(lambda: said.append(refusal(RowError, lambda: parse(row, "messages")))) < 1
    assert "messages[0] has 100,002 fields, at most 1,000" in said[0]


def test_many_columns_are_not_all_listed() -> None:
    said = refusal(RowError, lambda: detect({f"key{i}": 1 for i in range(300)}))
    assert "key9 and 290 more" in said


@pytest.mark.parametrize(
    "content", ["key{0}: 1\n", "key{0}: [1, 2, {{a: b}}]\n", "- {0}\n", "x{0}"]
)
def test_a_large_settings_file_is_refused_at_once(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("".join(content.format(i) for i in range(10_000_000 // len(content))))
    said: list[str] = []
    assert seconds(lambda: said.append(refusal(UserError, lambda: load_config(str(path))))) < 1
    assert said[0].startswith(f"{path}: more than 256 KiB")


def test_of_many_mistakes_in_settings_the_first_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\noutput: o\n" + "".join(f"key{i}: 1\n" for i in range(3000)))
    said: list[str] = []
    assert seconds(lambda: said.append(refusal(UserError, lambda: load_config(str(path))))) < 4
    assert said[0].count("\n") == 50
    assert said[0].endswith("\nand 2,950 more")


def test_words_of_a_large_text_are_read_as_those_of_a_small_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One by one or in lots: the same ids, the tokenizer's own."""
    tokenizer = ours("byte_level")
    text = "".join(
        random.Random(0).choices(
            ["the ", "quick", " lazy dog. ", "4, ", "\n\n", "naïve", "🙂", "  "], k=4000
        )
    )
    expected = tokenizer.backend.encode(text, add_special_tokens=False).ids
    for at_once in (1, 7, 1000, len(text) + 1):
        monkeypatch.setattr(word_cache, "AT_ONCE", at_once)
        assert tokenizer.encode_batch([text])[0].tolist() == expected


@pytest.mark.parametrize(("kind", "text", "why"), [
    ("byte_level", "a" * 2000, "without a space to cut at"),
    ("byte_level", "ab " * 900 + "b" * 1500 + " ab", "without a space to cut at"),
    ("metaspace", "some words " * 200, "this tokenizer cuts no text apart"),
    ("byte_level", "some words " * 2000, ""),
])  # fmt: skip
def test_a_text_too_long_for_one_go_is_refused_with_its_size(
    kind: str, text: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (oversize, __import__("sftx.data.store.encode_worker", fromlist=["x"])):
        monkeypatch.setattr(module, "AT_ONCE", 1000)
    encoder = Encoder(ours(kind), Data(template="none"), 64)
    lines = [{"text": "before"}, {"text": text}, {"text": "after"}]
    block = encode_block("\n".join(map(json.dumps, lines)).encode(), "text", encoder)
    if not why:
        assert block.facts.bad == []
        return
    [(line, said)] = block.facts.bad
    assert line == 1
    assert said.startswith("field 'text' holds ")
    assert why in said
    assert "Cut the text into several rows" in said


def test_splitting_takes_time_in_proportion_to_the_text() -> None:
    def split(count: int) -> None:
        weights = np.ones(count, np.float32)
        weights[0] = 0
        fitted = fit(
            TokenSequence(np.zeros(count, np.int32), weights, spans=((0, count),)), 32, "split"
        )
        assert sum(piece.targets for piece in fitted.pieces) == count - 1

    split(10_000)
    # 64 times as long where it grew with the square; 8 times, and a busy machine's noise, if not.
    assert any(
        seconds(lambda: split(320_000)) < 32 * seconds(lambda: split(40_000)) for _ in range(3)
    )


TEXT = (
    "{% set n = namespace(x='ba') %}{% for i in range(22) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
LIST = (
    "{% set n = namespace(x=[2, 1]) %}{% for i in range(22) %}{% set n.x = n.x + n.x %}{% endfor %}"
)
HUGE: dict[str, tuple[str, str]] = {
    "a range, many times": ("{{ (range(99999) | list * 500) | sort | length }}", "49,999,500"),
    "rows, many times": ("{{ (messages * 50000000) | sort | length }}", "50,000,000"),
    "a slice of them": ("{{ (range(99999) | list * 1000)[::2] | length }}", "99,999,000"),
    "a text, many times": ("{{ ('ab' * 400000000) | list | length }}", "800,000,000"),
    "times a text": ("{{ (400000000 * 'ab') | list | length }}", "800,000,000"),
    "a doubled text, sorted": (TEXT + "{{ n.x | sort | length }}", "8,388,608 elements to `sort`"),
    "a doubled list, sorted": (LIST + "{{ n.x | sort | length }}", "8,388,608 elements to `sort`"),
    "a doubled list, sliced": (
        LIST + "{{ n.x | slice(3) | list | length }}",
        "8,388,608 elements to `slice`",
    ),
    "in lots": (LIST + "{{ n.x | batch(3) | list | length }}", "8,388,608 elements to `batch`"),
    "its kinds": (LIST + "{{ n.x | unique | list | length }}", "8,388,608 elements to `unique`"),
    "a wide lot": (
        "{{ messages | batch(10**9, 'f') | list | length }}",
        "took more than 1,024 MiB of memory",
    ),
    "wide text": ("{{ 'x' | center(2000000000) | length }}", "took more than 1,024 MiB of memory"),
    "a number, squared": (
        "{% set n = namespace(x=7**999) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% "
        "endfor %}{{ n.x }}",
        "a number of more than 1,000,000 bits",
    ),
    "a power of a power": (
        "{% set n = namespace(x=10**999) %}{{ n.x ** 999 ** 1 }}",
        "more than 1,000,000 bits",
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_what_cannot_be_interrupted_is_refused_by_size_and_names_the_limit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sftx.data.chat.limits._own_process", True
    )  # limits of the whole process act too
    source, expected = HUGE[name]

    def render() -> None:
        with watched():
            run_template(compile_template(source), {"messages": [{"role": "user", "content": "x"}]})

    said: list[str] = []
    assert seconds(lambda: said.append(refusal(TEMPLATE_ERRORS, render))) < 3  # type: ignore[arg-type]
    assert expected in said[0]
    assert said[0] != "None"


def test_what_templates_do_stays_allowed() -> None:
    source = (
        "{{ '-' * 80 }}{{ (range(9999) | list) | sort | length }}{{ [3, 1] | sort }}{{ [1] * 3 "
        "}}{{ 2 ** 10 }}"
        "{{ 3 * 4 }}{{ messages | list | length }}{{ 'b,a'.split(',') | sort | join }}{{ {'b': 1} "
        "| dictsort }}"
    )
    with watched():
        text = run_template(compile_template(source), {"messages": [{"role": "user"}]})
    assert text == "-" * 80 + "9999[1, 3][1, 1, 1]1024121ab[('b', 1)]"


def test_an_interruption_beside_another_error_has_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The watchdog fires while memory runs out: one error comes after the other, and neither is
    called `None`.
    """
    from sftx.data.chat import limits

    def run_out_of_memory(watch: Any) -> None:
        with watch.deadline():
            watch.fired = True
            target, kind = (
                limits.ctypes.c_ulong(watch.target),
                limits.ctypes.py_object(limits._Interruption),
            )
            limits.ctypes.pythonapi.PyThreadState_SetAsyncExc(target, kind)
            raise MemoryError

    with watched():
        watch = limits._local.watch
        assert watch is not None
        with pytest.raises(limits.LimitError, match="took more than 1,024 MiB"):
            run_out_of_memory(watch)
        with watch.deadline():  # the next rendering is watched again
            assert not watch.fired
