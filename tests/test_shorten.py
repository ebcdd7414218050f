"""Conversations longer than an example may be: cut between turns, behind the system message and the
tools.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_template import CALLS, CHATML, REWRITES, encoded, encoder, model, row, user

from sftx.data.encoder import Encoded
from sftx.data.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "be quick"}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "in Paris", "parameters": {}},
}


def spoken(message: dict[str, Any]) -> str:
    """One message as CHATML and CALLS write it."""
    calls = "".join(json.dumps(call["function"]) for call in message.get("tool_calls", ()))
    return f"<|im_start|>{message['role']}\n{message['content']}{calls}<|im_end|>\n"


def outputs(result: Encoded, tokenizer: Tokenizer) -> list[str]:
    """The text of every output, in order."""
    found = []
    for example in result.examples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], example.weights != 0, [0]])))
        found += [
            tokenizer.decode(example.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]
    return found


def parts(example: Any, tokenizer: Tokenizer) -> list[str]:
    """The messages of an example, as they are written."""
    return re.findall(r"<\|im_start\|>.*?<\|im_end\|>", tokenizer.decode(example.ids), re.DOTALL)


def trajectory(steps: int, size: int) -> list[dict[str, Any]]:
    """One task, and so many calls with their results."""
    talk = [SYSTEM, user("task: " + "fox " * 8)]
    for i in range(steps):
        call = {"type": "function", "function": {"name": "weather", "arguments": {"n": i}}}
        talk += [
            model(f"step {i}", tool_calls=[call]),
            {"role": "tool", "content": f"result {i}" + " dog" * size},
        ]
    return [*talk, model("done")]


def test_pieces_of_a_dialogue_begin_at_a_user_behind_the_system_message() -> None:
    talk = [SYSTEM]
    for i in range(12):
        talk += [user(f"question {i}" + " fox" * 10), model(f"answer {i}" + " dog" * 10)]
    whole = encoded(row(talk), encoder(CHATML))
    made = encoder(CHATML, length=130)
    result = encoded(row(talk), made)
    assert result.action == "split"
    assert len(result.examples) > 2
    assert outputs(result, made.tokenizer) == outputs(whole, made.tokenizer)
    first = 1
    for example in result.examples:
        texts = [text.removesuffix("\n") for text in map(spoken, talk)]
        found = parts(example, made.tokenizer)
        assert len(example.ids) <= 130
        assert found[0] == texts[0]
        begin = texts.index(found[1])
        assert talk[begin]["role"] == "user"
        assert found[1:] == texts[begin : begin + len(found) - 1]
        assert "".join(
            spoken(talk[i]) for i in [0, *range(begin, begin + len(found) - 1)]
        ).startswith(made.tokenizer.decode(example.ids))
        assert example.shortened == (begin > 1)
        assert ("earlier messages" in example.note) == (begin > 1)
        assert len(example.ids) > 100 or example is result.examples[0]  # as much context as fits
        assert begin >= first
        first = begin
    assert (result.targets_truncated, result.tokens_truncated) == (0, 0)


def test_pieces_of_a_trajectory_keep_the_task_and_the_tools() -> None:
    """Whole exchanges are dropped: no piece begins with the result of a call that is not there."""
    talk = trajectory(14, 12)
    whole = encoded(row(talk, tools=(TOOL,)), encoder(CALLS))
    made = encoder(CALLS, length=380)
    assert len(whole.examples[0].ids) > 700
    result = encoded(row(talk, tools=(TOOL,)), made)
    assert outputs(result, made.tokenizer) == outputs(whole, made.tokenizer)
    texts = [text.removesuffix("\n") for text in map(spoken, talk)]
    tools = f"<|im_start|>system\n{json.dumps([TOOL])}<|im_end|>"
    for number, example in enumerate(result.examples):
        found = parts(example, made.tokenizer)
        assert 300 < len(example.ids) <= 380
        assert found[:3] == [tools, *texts[:2]]
        begin = texts.index(found[3])
        assert talk[begin]["role"] == "assistant"
        assert found[3:] == texts[begin : begin + len(found) - 3]
        assert example.shortened == (number > 0)
        before = made.tokenizer.decode(example.ids[: np.flatnonzero(example.weights)[0]])
        assert (
            number == 0 or before.count("<|im_start|>tool") > 0
        )  # the first target has an exchange before it
    assert len(result.examples) < 8


def test_sequences_of_turns_are_shortened_each_for_itself() -> None:
    """A template that gives a sequence per turn: those that fit stay as they are."""
    talk = []
    for i in range(6):
        talk += [user(f"question {i}" + " fox" * 10), model(f"answer {i}", reasoning_content="hm")]
    whole, made = encoded(row(talk), encoder(REWRITES)), encoder(REWRITES, length=110)
    result = encoded(row(talk), made)
    assert outputs(result, made.tokenizer) == outputs(whole, made.tokenizer)
    assert len(result.examples) == len(whole.examples) == 6
    for before, after in zip(whole.examples, result.examples, strict=True):
        assert len(after.ids) <= 110
        assert after.shortened == (len(before.ids) > 110)
        assert after.ids.tolist() == before.ids.tolist()[-len(after.ids) :]
        assert parts(after, made.tokenizer)[0].startswith("<|im_start|>user")
    assert result.action == "trained"


def test_a_message_that_is_too_long_is_cut_inside() -> None:
    """The only way left; it is flagged, and every target is there once."""
    talk = [SYSTEM, user("fox " * 200), model("dog " * 200), user("why?"), model("so")]
    made = encoder(CHATML, length=100)
    result = encoded(row(talk), made)
    whole = encoded(row(talk), encoder(CHATML))
    assert "".join(outputs(result, made.tokenizer)) == "".join(outputs(whole, made.tokenizer))
    assert all(len(example.ids) <= 100 for example in result.examples)
    assert all(example.shortened for example in result.examples)
    last = parts(result.examples[-1], made.tokenizer)
    assert last == [text.removesuffix("\n") for text in map(spoken, [SYSTEM, *talk[3:]])]


def test_a_long_answer_begins_behind_its_whole_prompt() -> None:
    made = encoder(CHATML, length=100)
    result = encoded(row([SYSTEM, user("fox " * 30), model("dog " * 200)]), made)
    first, *others = result.examples
    assert made.tokenizer.decode(first.ids).startswith(spoken(SYSTEM) + spoken(user("fox " * 30)))
    assert not first.shortened
    assert all(example.shortened for example in others)


def test_a_template_that_wants_the_first_turn_gets_it() -> None:
    """Where no shorter conversation can be rendered, tokens are cut as before."""
    wants = "{{ raise_exception('no greeting') if messages[0].content != 'hello' }}" + CHATML
    talk = [user("hello"), model("yes")]
    for i in range(8):
        talk += [user(f"question {i}" + " fox" * 10), model(f"answer {i}")]
    made = encoder(wants, length=90)
    result = encoded(row(talk), made)
    assert outputs(result, made.tokenizer) == outputs(
        encoded(row(talk), encoder(wants)), made.tokenizer
    )
    assert all(len(example.ids) <= 90 for example in result.examples)


def test_a_prompt_that_lost_its_first_token_alone_is_flagged() -> None:
    talk = [user("hello"), model("0 fox" + " dog" * 28), user("end"), model("of it")]
    first = encoded(row(talk), encoder(CHATML, length=40)).examples[0]
    assert len(first.ids) == 40  # of 41
    assert first.shortened


WORDS = st.integers(0, 30).map(lambda count: "fox" + " dog" * count)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "tool"]), WORDS), min_size=1, max_size=10
    ),
    st.booleans(),
    st.integers(40, 160),
    st.sampled_from([CHATML, REWRITES]),
)
def test_every_output_is_trained_once(
    turns: list[tuple[str, str]], system: bool, length: int, template: str
) -> None:
    """Whatever the order of roles and the length; and alone as in a batch."""
    talk = [SYSTEM] * system + [user("hello")]
    talk += [{"role": role, "content": f"{i} {text}"} for i, (role, text) in enumerate(turns)]
    talk += [user("end"), model("of it")]
    made = encoder(template, length=length)
    whole = encoded(row(talk), encoder(template))
    result = encoded(row(talk), made)
    assert "".join(outputs(result, made.tokenizer)) == "".join(outputs(whole, made.tokenizer))
    assert all(len(example.ids) <= length for example in result.examples)
    assert not any(example.weights[0] for example in result.examples)
    full = whole.examples[-1].ids.tolist()
    for example in result.examples:
        if not example.shortened:  # then all that stands before its targets is there
            upto = int(np.flatnonzero(example.weights)[-1]) + 1
            assert any(
                example.ids.tolist()[:upto] == other.ids.tolist()[:upto] for other in whole.examples
            )
    assert full
    again = made.encode([row([user("x"), model("y")]), row(talk)])[1]
    assert isinstance(again, Encoded)
    assert [e.ids.tolist() for e in again.examples] == [e.ids.tolist() for e in result.examples]


@pytest.mark.parametrize("how", ["truncate_left", "truncate_right"])
def test_truncation_flags_what_stands_behind_less(how: Any) -> None:
    talk = [user("fox " * 20), model("dog"), user("fox " * 20), model("dog " * 20)]
    made = encoder(CHATML, length=80, too_long=how)
    (example,) = encoded(row(talk), made).examples
    assert example.shortened == (how == "truncate_left")
