"""Metrics on outputs and references: values worked out by hand, bad metrics named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftx.eval.metrics import METRICS, calls_in, check_metric, score
from sftx.types import UserError

CALL = json.dumps({"name": "add", "arguments": {"a": 1, "b": [2]}})


@pytest.mark.parametrize(
    ("name", "output", "reference", "expected"),
    [
        ("exact", " yes\n", "yes", 1),
        ("exact", "Yes", "yes", 0),
        ("contains", "the answer is 42.", "42", 1),
        ("contains", "the answer is 41.", "42", 0),
        ("number", "so 3 and 4 make 1,200.", "#### 1200", 1),
        ("number", "it costs $7.50", "7.5", 1),
        ("number", "-3", "3", 0),
        ("number", "no idea", "nothing", 0),
        ("f1", "The cat sat!", "a cat sat", 1),
        ("f1", "cat dog", "cat", 2 / 3),
        ("f1", "cat cat", "cat dog", 1 / 2),
        ("f1", "", "", 1),
        ("f1", "", "cat", 0),
        ("json_valid", '{"a": [1, null]}', "", 1),
        ("json_valid", '{"a": 1} and more', "", 0),
        ("json_valid", '{"a": NaN}', "", 0),
        ("json_valid", "[" * 100_000, "", 0),
        ("tool_call", f"<tool_call>\n{CALL}\n</tool_call>", CALL, 1),
        ("tool_call", CALL.replace("1", "9"), CALL, 0),
        ("tool_call", CALL + CALL, CALL, 0),
        ("tool_call", '{"name": "add", "parameters": "{\\"b\\": [2], \\"a\\": 1}"}', CALL, 1),
        ("tool_call", "I will add them.", CALL, 0),
        ("tool_call", "<function=f>\n  1 </function>", "<function=f> 1 </function>", 1),
        ("rouge_l", "the cat sat", "the cat ran", 2 / 3),
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", 100),
        ("chrf", "abc", "abc", 100),
    ],
)
def test_a_metric_gives_what_is_worked_out_by_hand(
    name: str, output: str, reference: str, expected: float
) -> None:
    if name in ("rouge_l", "bleu", "chrf"):
        pytest.importorskip("rouge_score" if name == "rouge_l" else "sacrebleu")
    assert score([name], [""], [output], [reference])[name] == [pytest.approx(expected)]


def test_calls_are_found_wherever_they_stand() -> None:
    openai = json.dumps({"type": "function", "function": json.loads(CALL)})
    assert calls_in(f"First {{x}}: {openai}, then {CALL}") == [("add", {"a": 1, "b": [2]})] * 2


def test_every_metric_takes_no_sample() -> None:
    for name in METRICS:
        if name in ("rouge_l", "bleu", "chrf"):
            pytest.importorskip("rouge_score" if name == "rouge_l" else "sacrebleu")
        assert score([name], [], [], []) == {name: []}


def test_a_function_of_the_user_counts(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def lengths(samples, prompts, outputs, references):\n"
        "    return {'said': [len(o) for o in outputs], 'asked': [len(p) for p in prompts]}\n"
    )
    found = score(["exact", f"{own}:lengths"], ["ab", "c"], ["x", "yyy"], ["x", "y"])
    assert found == {"exact": [1, 0], "said": [1, 3], "asked": [2, 1]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1]", "a dictionary of lists is needed"),
        ("return {'m': [1]}", "'m' has 1 numbers for 2 samples"),
        ("return {'m': [1, float('nan')]}", "'m' of sample 1 is nan"),
        ("return {'m': [1, 'x']}", "something else than numbers"),
        ("return {'m': 3}", "something else than numbers"),
    ],
)
def test_what_a_users_metric_returns_is_checked(tmp_path: Path, body: str, message: str) -> None:
    own = tmp_path / "own.py"
    own.write_text(f"def metric(samples, prompts, outputs, references):\n    {body}\n")
    with pytest.raises(UserError, match=r"own\.py:metric") as caught:
        score([f"{own}:metric"], ["", ""], ["a", "b"], ["a", "b"])
    assert message in str(caught.value)


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("x = 1\n")
    (tmp_path / "own.txt").write_text("x = 1\n")
    for name, message in (
        ("exactly", "one of exact, contains"),
        (f"{tmp_path}/other.py:f", "there is no file"),
        (f"{tmp_path}/own.py:f", "has no function 'f'"),
        (f"{tmp_path}/own.py:x", "has no function 'x'"),
        (f"{tmp_path}/own.txt:x", "is no Python file"),
    ):
        with pytest.raises(UserError, match=message):
            check_metric(name)
    check_metric("exact")


def test_a_metric_whose_package_is_absent_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"bleu needs sacrebleu.*pip install 'sftx\[eval\]'"):
        check_metric("bleu")
