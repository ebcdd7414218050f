"""Planted faults are found and named; good data is left alone."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from sftx.cli import main
from sftx.data.encode_row import encode
from sftx.data.encoder import Encoder
from sftx.data.lint.minhash import NearDuplicates
from sftx.data.lint.rules import Finding, lint
from sftx.data.token_view import view
from sftx.data.tokenizer import Tokenizer
from sftx.settings.keywords import SourceSettings
from sftx.settings.make import make_config
from sftx.types import UserError

WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "window",
    "garden",
    "music",
    "letter",
    "bridge",
    "winter",
    "summer",
    "candle",
    "forest",
    "mirror",
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.of(tiny.tokenizer())


def chat(*turns: str, roles: str = "ua") -> dict[str, Any]:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    order = roles * len(turns)
    return {
        "messages": [{"role": names[order[i]], "content": text} for i, text in enumerate(turns)]
    }


def good(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        chat(" ".join(rng.choices(WORDS, k=20)), " ".join(rng.choices(WORDS, k=12)))
        for _ in range(count)
    ]


def find(
    tokenizer: Tokenizer, rows: list[Any], length: int = 512, **data: Any
) -> dict[str, Finding]:
    sections: dict[str, Any] = {"data": {"rows": rows, "workers": 0, **data}}
    config = make_config(model="m", output="o", **sections)
    findings = lint(config, Encoder(tokenizer, config.data, length))
    assert [f.serious for f in findings] == sorted((f.serious for f in findings), reverse=True)
    return {f.check: f for f in findings}


def test_good_data_has_no_findings(tokenizer: Tokenizer) -> None:
    assert find(tokenizer, good(200), eval_rows=good(20, seed=1)) == {}
    assert (
        find(
            tokenizer, [{"text": " ".join(random.Random(i).choices(WORDS, k=40))} for i in range(8)]
        )
        == {}
    )


SECRET = "ghp_" + "a1B2" * 9


@pytest.mark.parametrize(
    ("row", "check", "serious"),
    [
        (chat("hello there", ""), "empty outputs", True),
        (chat("hello there", "x"), "short outputs", False),
        (chat("a question", "b", "c", "d e f g h", roles="uaau"), "role order", False),
        (chat("a question", "Be brief.", "an answer", roles="usa"), "role order", False),
        (chat("a question", "a result", "an answer", roles="uta"), "role order", False),
        (chat("Itâ€™s cafÃ© time", "naïve façade"), "mojibake", False),
        (chat("my key is " + SECRET, "thank you"), "secrets", True),
        (chat("pay with 4539 1488 0343 6467 please", "no thanks"), "secrets", True),
        (chat("what is <|user|> for?", "a role"), "special tokens", False),
        (chat("[INST] translate this [/INST]", "bonjour"), "template mismatch", False),
        (chat("x " * 6000, "a long one"), "extreme lengths", False),
        (chat("how is it done?", "I'm sorry, but I can't help with that."), "refusals", False),
        (chat("how is it done?", "As an AI language model, I have no hands."), "refusals", False),
        (chat("how is it done?", "I cannot assist with this request."), "refusals", False),
        (chat("how is it done?", "Like this:<br>first, <strong>look</strong>"), "html", False),
        (chat("how is it done?", "Like &quot;this&quot;, I think."), "html", False),
        (chat("how is it done?", "```python\nprint(1)"), "cut answers", False),
        (chat("how is it done?", "word " * 30 + "and the"), "cut answers", False),
        (
            chat(
                "how is it done?",
                "One goes first. " * 8 + "Then one of the others takes its turn and",
            ),
            "cut answers",
            False,
        ),
        (
            chat(
                "how is it done?",
                "One goes first. " * 8 + "Then each of the others will take its own tur",
            ),
            "cut answers",
            False,
        ),
        (chat("how is it done, by hand?", "How is it done, by hand? Like so."), "echo", False),
        ({"messages": 3}, "bad rows", True),
    ],
)
def test_a_planted_fault_is_found(
    tokenizer: Tokenizer, row: Any, check: str, serious: bool
) -> None:
    rows = good(150)
    rows.insert(77, row)
    findings = find(tokenizer, rows, 20_000)
    assert findings[check].count == 1
    assert findings[check].serious == serious
    assert findings[check].places[0].startswith("rows, row 78")
    assert SECRET not in json.dumps([asdict(f) for f in findings.values()])


def test_lost_targets_are_serious(tokenizer: Tokenizer) -> None:
    rows = [*good(5), chat("a question", "word " * 200)]
    assert find(tokenizer, rows, 400, too_long="truncate_right")["lost targets"].places == [
        "rows, row 6"
    ]
    assert find(tokenizer, rows, 400, too_long="drop")["dropped rows"].count == 1
    split = find(tokenizer, rows, 400)
    assert "lost targets" not in split
    assert not split["split rows"].serious


def test_shortened_prompts_are_found(tokenizer: Tokenizer) -> None:
    """Serious where more than a tenth of the targets stand behind one."""
    long = chat("a question " * 14, "an answer", "a question " * 14, "an answer")
    found = find(tokenizer, [long], 250)["shortened prompts"]
    assert (found.count, found.serious, found.places) == (1, True, ["rows, row 1"])
    assert not find(tokenizer, [long, *good(20)], 250)["shortened prompts"].serious


def test_outputs_that_never_end(tokenizer: Tokenizer) -> None:
    rows = [
        {"segments": [{"text": f"question {i}", "weight": 0}, {"text": f"answer {i}", "weight": 1}]}
        for i in range(9)
    ]
    assert find(tokenizer, rows)["endless outputs"].count == 9


def test_copies(tokenizer: Tokenizer) -> None:
    """Exact copies by what is trained on, whatever else the line says; near copies; copies in the
    held-out rows.
    """
    rows = good(100)
    changed = json.loads(json.dumps(rows[7]))
    changed["messages"][1]["content"] += " indeed"
    near = json.loads(
        json.dumps(rows[8]).replace('"user", "content": "', '"user", "content": "so ')
    )
    copies = [{**rows[3], "id": "other"}, changed]
    findings = find(tokenizer, rows + copies, eval_rows=[*good(5, seed=1), near, rows[11]])
    assert findings["exact duplicates"].places == ["rows, row 101"]
    assert findings["near duplicates"].places == ["rows, row 102"]
    assert findings["overlap"].places == ["rows, row 7"]
    assert findings["near overlap"].places == ["rows, row 6"]


def test_good_answers_are_left_alone(tokenizer: Tokenizer) -> None:
    """What looks like a refusal, HTML, a cut or an echo at a glance only."""
    answers = [
        "Sorry for the delay. You can't miss it: turn left.",
        "The function cannot fail.",
        "```html\n<div>code</div>\n```\nand `<br>` breaks a line",
        "if a < b and c > d then x",
        "First one. Then two. " * 4 + "At last, in the end:\n- one of the things on this list",
        "One goes first. " * 8 + "```python\nprint(1)\n```",
        "One goes first. " * 8 + "That is all there is to say of this.",
        "yes",
    ]
    rows = [chat(f"a question of number {i}", answer) for i, answer in enumerate(answers)]
    found = find(tokenizer, good(40) + rows)
    assert not found.keys() & {"refusals", "html", "cut answers", "echo"}, found


def test_answers_are_compared_apart_from_prompts(tokenizer: Tokenizer) -> None:
    """Questions about one passage are alike; rows are so only where their answers are too. Each
    names its partner.
    """
    rng = random.Random(5)
    passage = " ".join(rng.choices(WORDS, k=300))
    replies = [" ".join(rng.choices(WORDS, k=4)) for _ in range(8)]
    rows = [chat(f"{passage} what is number {i}?", reply) for i, reply in enumerate(replies)]
    held = [
        chat(f"{passage} what is number {i}?", reply)
        for i, reply in ((8, "quite another reply"), (2, replies[2] + " "))
    ]
    found = find(tokenizer, good(20) + rows, 4096, eval_rows=held)
    assert "near duplicates" not in found
    assert found["near overlap"].places == ["rows, row 2"]
    assert found["near overlap"].partners == ["rows, row 23"]
    both = find(
        tokenizer,
        [*good(4), rows[0], chat(passage + " what is number 0 then?", replies[0]), rows[0]],
    )
    assert (both["near duplicates"].places, both["near duplicates"].partners) == (
        ["rows, row 6"],
        ["rows, row 5"],
    )
    assert (both["exact duplicates"].places, both["exact duplicates"].partners) == (
        ["rows, row 7"],
        ["rows, row 5"],
    )


def test_every_row_of_a_finding_is_named(tokenizer: Tokenizer) -> None:
    rows = good(30)
    found = find(tokenizer, rows * 2, eval_rows=rows[:12])
    assert found["exact duplicates"].places == [f"rows, row {31 + i}" for i in range(30)]
    assert found["exact duplicates"].partners == [f"rows, row {1 + i}" for i in range(30)]
    assert (found["overlap"].count, found["overlap"].partners) == (
        12,
        [f"rows, row {1 + i}" for i in range(12)],
    )


def test_odd_arguments_of_tools_are_found() -> None:
    """Null almost everywhere, invented by a table, or not in the schema of the tool."""
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls %}{{ "
        "c.function | tojson }}"
    )
    source += (
        "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = Tokenizer.of(tiny.tokenizer())
    tokenizer.chat_templates = {"default": source}

    def row(number: int, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
        talk = chat(f"log in {number}", "well done")["messages"]
        return {
            "messages": [
                talk[0],
                {**talk[1], "tool_calls": [{"name": "login", "arguments": arguments}]},
            ],
            **more,
        }

    rows = [row(i, {"key": f"{i} a", "unit": None}) for i in range(9)]
    tools = [{"name": "login", "parameters": {"properties": {"key": {}}}}]
    rows += [row(10, {"key": "b", "n": None}, tools=tools), row(11, {"kye": "c"}, tools=tools)]
    found = find(tokenizer, rows)
    assert found["null arguments"].places == [f"rows, row {i}" for i in range(1, 10)]
    assert found["null arguments"].message.endswith(": login.unit")
    assert found["invented nulls"].places == ["rows, row 10"]
    assert found["strange arguments"].places == ["rows, row 11"]
    assert found["strange arguments"].message.endswith(": login.kye")
    assert "null arguments" not in find(
        tokenizer, [row(i, {"key": f"{i} a" if i % 2 else None}) for i in range(20)]
    )


def test_near_duplicates_finds_planted_pairs() -> None:
    rng = random.Random(3)
    vocabulary = [f"w{i}" for i in range(500)]
    texts = [" ".join(rng.choices(vocabulary, k=120)) for _ in range(600)]
    for i in range(0, 100):
        words = texts[i].split()
        words[rng.randrange(120)] = "changed"
        texts.append(" ".join(words))
    seen = NearDuplicates()
    found = [seen.add(text) for text in texts]
    assert found[:600] == [None] * 600
    assert {f - i for i, f in enumerate(found[600:]) if f is not None} == {0}
    assert sum(f is not None for f in found) >= 90
    seen = NearDuplicates()
    assert [seen.add(text) for text in ("a b", "a b", "a c", "", "\ud800", "a b")] == [
        None,
        0,
        None,
        None,
        None,
        0,
    ]


def test_without_its_package_lint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match=r'pip install "sftx\[lint\]"'):
        NearDuplicates()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 for good data, 1 for something serious, and the same findings as JSON."""
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    arguments = [
        "lint",
        f"model={tmp_path / 'model'}",
        f"data={data}",
        f"json={tmp_path / 'out.json'}",
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in good(20)))
    assert main(arguments) == 0
    assert "nothing found" in capsys.readouterr().out
    data.write_text("".join(json.dumps(row) + "\n" for row in [*good(20), chat("hi", "")]))
    assert main(arguments) == 1
    assert f"{data}:21" in capsys.readouterr().out.replace("\n", "")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(f["check"], f["count"], f["places"]) for f in found] == [
        ("empty outputs", 1, [f"{data}:21"])
    ]


def test_a_mixture_by_tokens_repeats_no_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, rows in (("a.jsonl", good(50)), ("b.jsonl", good(9, seed=1))):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    train: list[SourceSettings] = [
        {"path": str(tmp_path / name), "weight": 2.0} for name in ("a.jsonl", "b.jsonl")
    ]
    config = make_config(
        model="m", output="o", data={"train": train, "mix_by": "tokens", "workers": 0}
    )
    assert lint(config, Encoder(tokenizer, config.data, 512)) == []


def test_a_secret_in_a_tool_call_is_found(tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "login", "arguments": {"key": SECRET}}}
    row = chat("log in", "done")
    row["messages"][1]["tool_calls"] = [call]
    assert find(tokenizer, [*good(9), row])["secrets"].places == ["rows, row 10"]


def test_a_vocabulary_may_have_holes() -> None:
    words = Backend(WordLevel({"a": 0, "b": 1, "<eos>": 9}, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["<eos>"])
    tokenizer = Tokenizer(words, {"eos_token": "<eos>"}, {})
    rows = [{"input_ids": [0, 1, 0, 1, 9]}, {"input_ids": [1, 5, 1, 1, 9]}]
    assert find(tokenizer, rows) == {}
    assert view(encode(rows[1], tokenizer)[0], tokenizer, "here").special == [False] * 4 + [True]


def test_numbers_are_no_card_numbers(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [
        {"text": "count: " + " ".join(str(rng.randrange(10)) for _ in range(40))} for _ in range(40)
    ]
    tokens = [{"input_ids": [rng.randrange(8, 260) for _ in range(39)] + [2]} for _ in range(40)]
    assert "secrets" not in find(tokenizer, texts)
    assert "secrets" not in find(tokenizer, tokens)
    assert find(tokenizer, [*texts, {"text": "pay with 4539148803436467"}])["secrets"].count == 1
