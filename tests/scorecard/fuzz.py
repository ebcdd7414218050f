"""Broken rows, files and templates by the thousand, from hypothesis: a clear error or a counted
skip, nothing else.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from scorecard.frame import expect
from scorecard.good_rows import GOOD
from sftx.data.encoder import Encoder
from sftx.data.sources.formats import REQUIRED
from sftx.data.sources.rows import parse
from sftx.data.sources.to_jsonl import convert
from sftx.data.store.encode_worker import encode_block
from sftx.data.tokenizer import Tokenizer
from sftx.settings.schema import Data
from sftx.types import RowError, UserError

SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
TEXT = some.text(max_size=12) | some.sampled_from(
    ["<|end|>", "<eos>", "<|user|>", "{{ x }}", "\ud800", "\0", "é" * 3]
)
VALUES = some.recursive(
    some.none() | some.booleans() | some.integers(-9, 2**70) | some.floats() | TEXT,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@some.composite
def changed_rows(draw: Any, form: str) -> bytes:
    """A good row of a format with one value replaced, or some of its bytes."""
    row = json.loads(json.dumps(GOOD[form]))
    place, key = row, 0 if isinstance(row, list) else draw(some.sampled_from(sorted(row)))
    while isinstance(place[key], list | dict) and place[key] and draw(some.booleans()):
        place = place[key]
        key = (
            draw(some.sampled_from(sorted(place)))
            if isinstance(place, dict)
            else draw(some.integers(0, len(place) - 1))
        )
    kind = draw(some.sampled_from(["good", "value", "value", "lost", "bytes", "noise"]))
    if kind == "value":
        place[key] = draw(VALUES)
    elif kind == "lost":
        del place[key]
    raw = json.dumps(row, ensure_ascii=draw(some.booleans())).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        at = draw(some.integers(0, len(raw) - 1))
        raw = raw[:at] + draw(some.binary(max_size=3)) + raw[at + draw(some.integers(0, 4)) :]
    elif kind == "noise":
        raw = draw(some.binary(max_size=30))
    return raw.replace(b"\n", b" ")


def _repeat(examples: int, test: Callable[..., None], **strategies: Any) -> None:
    quiet = settings(
        max_examples=examples,
        deadline=20_000,
        database=None,
        derandomize=True,
        suppress_health_check=SLOW_IS_FINE,
    )
    quiet(given(**strategies)(test))()


def rows(folder: Path, examples: int) -> int:
    """Rows through parsing, rendering and encoding; returns how many rows there were.

    A row is judged the same in a block with others as alone, and under its own line number.
    """
    encoder = Encoder(_tokenizer(folder), Data(), 128)
    count = 0

    def verdicts(lines: list[bytes], form: str) -> dict[int, str]:
        block = encode_block(b"\n".join(lines), form, encoder)
        found = {int(line): "trained" for line in block.table["line"]}
        return {
            **found,
            **{line: why for kind in (block.facts.bad, block.facts.dropped) for line, why in kind},
        }

    def judge(form: str, data: Any) -> None:
        nonlocal count
        lines = data.draw(some.lists(changed_rows(form), min_size=1, max_size=4))
        together = verdicts(lines, form)
        count += len(lines)
        for number, line in enumerate(lines):
            alone = verdicts([line], form).get(0)
            expect(
                together.get(number) == alone,
                f"line {number} of {lines}: {together.get(number)} but alone {alone}",
            )
            expect(
                (alone is None) == (not line or line.isspace()), f"row not accounted for: {line!r}"
            )

    _repeat(examples, judge, form=some.sampled_from(sorted(REQUIRED)), data=some.data())
    return count


def files(folder: Path, examples: int) -> int:
    """Files of every format with damaged content; returns how many."""
    plain = b"\n".join(json.dumps(row).encode() for row in GOOD.values())
    whole = {
        ".csv": b'a,b\n"x\ny",2\n3,4\n',
        ".tsv": b"a\tb\n1\t2\n",
        ".txt": b"text\n",
        ".json": b"[" + plain[:50] + b"]",
    }
    whole |= {
        ".jsonl.gz": b"\x1f\x8b\x08",
        ".parquet": b"PAR1",
        ".arrow": b"ARROW1\0\0",
        ".jsonl.zst": b"\x28\xb5\x2f\xfd",
    }

    def read(suffix: str, noise: bytes, at: int) -> None:
        path, out = folder / f"file{suffix}", io.BytesIO()
        path.write_bytes(whole[suffix][:at] + noise + whole[suffix][at:])
        try:
            convert([path], out)
        except UserError as error:
            expect(str(path) in str(error), f"the message does not name the file: {error}")
        if suffix == ".csv" and out.getvalue():
            lines = path.read_bytes().count(b"\n") + 1
            expect(
                out.getvalue().count(b"\n") <= lines,
                f"more lines than the file has: {path.read_bytes()!r}",
            )

    noise = some.binary(max_size=20) | some.sampled_from(
        [b"\xff", b'"', b"\n", b"\r", b"\0", b"]", b",,"]
    )
    _repeat(
        examples,
        read,
        suffix=some.sampled_from(sorted(whole)),
        noise=noise,
        at=some.integers(0, 60),
    )
    return examples


PIECES = [
    *(
        "{% for message in messages %}",
        "{% endfor %}",
        "{{ message.role }}",
        "{{ message.content }}",
        "<|end|>",
        "\n",
    ),
    *(
        "{% if add_generation_prompt %}",
        "{% endif %}",
        "<|assistant|>",
        "{{ bos_token }}",
        "{{ messages[-1] }}",
        "{{",
    ),
    *(
        "{{ message.content | trim }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ messages }}",
        "{% set x = 1 %}",
    ),
    *(
        "{{ message['content'] * 3 }}",
        "{{ x.y.z }}",
        "<think>",
        "</think>",
        "{% generation %}",
        "{% endgeneration %}",
    ),
    *(
        "{{ ''.__class__ }}",
        "{% include 'x' %}",
        "{{ range(10**9) }}",
        "{{ messages | tojson }}",
        "{{ loop.index }}",
    ),
]


def templates(folder: Path, examples: int) -> int:
    """Made-up templates over changed conversations; returns how many."""
    tokenizer, path = _tokenizer(folder), folder / "made.jinja"
    cuts = [
        tiny.CHAT_TEMPLATE[i:j]
        for i in (0, 20, 61)
        for j in (40, 61, 90, len(tiny.CHAT_TEMPLATE))
        if i < j
    ]
    sources = some.lists(some.sampled_from(PIECES + cuts), max_size=7).map("".join) | some.just(
        tiny.CHAT_TEMPLATE
    )

    def render(source: str, row: bytes) -> None:
        path.write_text(source)
        try:
            encoder = Encoder(tokenizer, Data(template=str(path)), 128)
            conversation = parse(json.loads(row), "messages")
        except (UserError, ValueError):  # ValueError: of json, which is not under test here
            return
        for encoded in encoder.encode([conversation]):
            if not isinstance(encoded, RowError):
                expect(
                    all(len(e.ids) == len(e.weights) for e in encoded.examples),
                    f"{source!r}: lengths differ",
                )

    _repeat(examples, render, source=sources, row=changed_rows("messages"))
    return examples


def _tokenizer(folder: Path) -> Tokenizer:
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return Tokenizer.load(str(folder / "tokenizer"))
