"""Raw rows to `Row`s: shapes told apart, values kept, mistakes named by their field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftx.data.sources.arguments import INVENTED
from sftx.data.sources.formats import check_names, detect, renamed, unused
from sftx.data.sources.messages import other_fields
from sftx.data.sources.rows import parse
from sftx.types import Message, Phrase, Row, RowError, UserError

USER: Message = {"role": "user", "content": "Hi"}
MODEL: Message = {"role": "assistant", "content": "Hello"}
PAIR = (Phrase("Hi", 0.0), Phrase("Hello", 1.0))


def messages_of(made: Row) -> list[dict[str, Any]]:
    return [{**message} for message in made.messages]


def call(arguments: Any) -> dict[str, Any]:
    return {"function": {"name": "f", "arguments": arguments}}


def row(raw: Any) -> Row:
    return parse(raw, detect(raw))


@pytest.mark.parametrize(
    ("raw", "form", "expected"),
    [
        ("Hi", "text", Row("text", text="Hi")),
        ({"text": "Hi"}, "text", Row("text", text="Hi")),
        (["Hi", "Hello"], "dialogue", Row("phrases", phrases=PAIR)),
        ({"dialogue": ["Hi", "Hello"]}, "dialogue", Row("phrases", phrases=PAIR)),
        ({"prompt": "Hi", "completion": "Hello"}, "pairs", Row("phrases", phrases=PAIR)),
        (
            {"instruction": "Hi", "input": "", "output": "Hello"},
            "alpaca",
            Row("phrases", phrases=PAIR),
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "alpaca",
            Row("phrases", phrases=(Phrase("Add.\n\n1 2", 0.0), Phrase("3", 1.0))),
        ),
        ([USER, MODEL], "messages", Row("messages", messages=(USER, MODEL))),
        ({"messages": [USER, MODEL]}, "messages", Row("messages", messages=(USER, MODEL))),
        (
            {"prompt": [USER, MODEL, USER], "completion": [MODEL]},
            "pairs",
            Row(
                "messages",
                messages=(
                    {**USER, "train": False},
                    {**MODEL, "train": False},
                    {**USER, "train": False},
                    MODEL,
                ),
                prompts=frozenset({0, 1, 2}),
            ),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            "sharegpt",
            Row("messages", messages=(USER, MODEL)),
        ),
        (
            {"segments": [{"text": "a", "weight": 0}, {"text": "b", "weight": 0.5}]},
            "segments",
            Row("segments", phrases=(Phrase("a", 0.0), Phrase("b", 0.5))),
        ),
        ({"input_ids": [5, 6]}, "tokens", Row("tokens", ids=(5, 6), weights=(1.0, 1.0))),
        (
            {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]},
            "tokens",
            Row("tokens", ids=(5, 6, 7), weights=(0.0, 1.0, 0.0)),
        ),
        (
            {"input_ids": [5, 6], "weights": [0, 0.25], "attention_mask": [1, 1]},
            "tokens",
            Row("tokens", ids=(5, 6), weights=(0.0, 0.25)),
        ),
    ],
)
def test_every_shape(raw: Any, form: str, expected: Row) -> None:
    assert detect(raw) == form
    assert parse(raw, form) == expected


def test_messages_keep_what_templates_read() -> None:
    """Parts joined, nulls absent, tool calls nested with objects for arguments, tools from JSON
    text.
    """
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "1"}'}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    raw = {
        "messages": [
            {"role": "developer", "content": "Be brief.", "name": None},
            {"role": "user", "content": parts},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call],
                "reasoning_content": "Hm.",
                "weight": 0.5,
            },
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            {"role": "assistant", "content": "", "train": False, "prefix": True},
        ],
        "tools": json.dumps([tool]),
        "chat_template_kwargs": {"enable_thinking": False},
        "source": "x",
    }
    made = row(raw)
    assert made.tools == (tool,)
    assert made.template_kwargs == {"enable_thinking": False}
    assert [m.get("content") for m in made.messages] == ["Be brief.", "Hi", "", "2", ""]
    assert "name" not in made.messages[0]
    third = messages_of(made)[2]
    assert third["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": "1"}}
    assert third["weight"] == 0.5
    assert made.messages[4] == {"role": "assistant", "content": "", "train": False, "prefix": True}
    assert unused(tuple(raw), "messages") == ("source",)
    flat = [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "1"}}]}]
    assert messages_of(row(flat))[1]["tool_calls"][0]["function"] == {
        "name": "f",
        "arguments": {"a": "1"},
    }


def test_sharegpt_roles() -> None:
    turns = [
        ("human", "q"),
        ("function_call", '{"name": "f", "arguments": {}}'),
        ("observation", "r"),
        ("gpt", "a"),
    ]
    raw = {
        "conversations": [{"from": f, "value": v} for f, v in turns],
        "system": "S",
        "tools": "[]",
    }
    made = messages_of(row(raw))
    assert [m["role"] for m in made] == ["system", "user", "assistant", "tool", "assistant"]
    assert made[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (5, "not a number"),
        (None, "not null"),
        ([], "a list must hold"),
        (["a", 1], "a list must hold"),
        ([1, 2], "input_ids"),
        (["a"], "odd number"),
        ({"dialogue": ["a", "b", "c"]}, "3 phrases, an odd number"),
        ({"dialogue": []}, "an empty list"),
        ({"dialogue": ["a", None]}, "dialogue[1]' must be text, not null"),
        ({"text": None}, "field 'text' must be text, not null"),
        ({"text": "\ud800"}, "surrogate"),
        ({}, "none; expected one of"),
        ({"txet": "a"}, "did you mean 'text'"),
        ({"prompt": "a", "completoin": "b"}, "did you mean 'completion'"),
        ({"prompt": "a", "completion": 1}, "field 'completion' must be text, not a number"),
        ({"prompt": "a", "completion": [MODEL]}, "both be texts or both be lists"),
        (
            {"prompt": "a", "completion": "b", "tools": [{}]},
            "'tools' needs prompt and completion to be lists",
        ),
        (
            {"question": "a", "answer": "b"},
            "set data.columns: {question: prompt, answer: completion}",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data"),
        ({"conversations": [USER, MODEL]}, "set data.columns: {conversations: messages}"),
        ({"text": "a", "messages": [USER]}, "choose one with data.format"),
        ({"messages": []}, "not an empty list"),
        ({"messages": "a"}, "not text"),
        ({"messages": [USER, "a"]}, "messages[1] must be an object with role"),
        (
            {"messages": [{"role": "asistant", "content": "a"}]},
            "messages[0].role is 'asistant'; did you mean 'assistant'?",
        ),
        ({"messages": [{"role": "human", "content": "a"}]}, "did you mean 'user'?"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content' must be text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "part of type 'image_url'",
        ),
        (
            {"messages": [{**MODEL, "function_call": {"name": "f"}}]},
            "function_call is not read: write it as tool_calls",
        ),
        ({"messages": [{**MODEL, "wieght": 0}]}, "did you mean 'weight'?"),
        ({"messages": [{**MODEL, "weight": "1"}]}, "messages[0].weight must be a number"),
        ({"messages": [{**MODEL, "weight": float("nan")}]}, "must be a number"),
        ({"messages": [{**MODEL, "weight": -1}]}, "at least 0"),
        ({"messages": [{**MODEL, "weight": 1e300}]}, "at most 3.4e+38"),
        ({"messages": [{**MODEL, "weight": 10**400}]}, "at most 3.4e+38"),
        ({"messages": [{**MODEL, "train": 1}]}, "messages[0].train must be true or false"),
        ({"messages": [{**MODEL, "tool_calls": "f"}]}, "tool_calls must be a list"),
        (
            {"messages": [{**MODEL, "tool_calls": [{"function": {"arguments": {}}}]}]},
            "tool_calls[0] must hold function",
        ),
        (
            {"messages": [{**MODEL, "tool_calls": [{"name": ["f"], "arguments": {"a": None}}]}]},
            "tool_calls[0] must hold function",
        ),
        (
            {
                "messages": [
                    {**MODEL, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "tool_calls[0].function.arguments is not valid JSON",
        ),
        ({"messages": [USER, MODEL], "tools": "{"}, "tools is not valid JSON"),
        (
            {"messages": [USER, {**MODEL, "tool_calls": [call("[" * 99_999)]}]},
            "not valid JSON: nested too deeply",
        ),
        (
            {"messages": [USER, {**MODEL, "tool_calls": [call("1" * 5000)]}]},
            "a number of thousands of digits",
        ),
        (
            {"messages": [USER, {**MODEL, "tool_calls": [call({"a": "\ud800"})]}]},
            "'messages[1]' holds half of",
        ),
        (
            {"messages": [USER, {**MODEL, "thinking": ["\ud800"]}]},
            "'messages[1]' holds half of a surrogate",
        ),
        (
            {"messages": [USER, MODEL], "tools": [{"name": "\ud800"}]},
            "'tools' holds half of a surrogate",
        ),
        (
            {"messages": [USER, MODEL], "chat_template_kwargs": {"a": "\ud800"}},
            "holds half of a surrogate",
        ),
        ({"messages": [USER, MODEL], "tools": ["f"]}, "'tools' must be a list"),
        ({"messages": [USER, MODEL], "tool": []}, "did you mean 'tools'?"),
        (
            {"messages": [USER, MODEL], "chat_template_kwargs": []} | {"chat_template_kwargs": [1]},
            "must be an object",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            "conversations[0].from is 'narrator', an unknown role",
        ),
        (
            {"conversations": [{"from": "human"}]},
            "conversations[0] must be an object with from and value",
        ),
        (
            {"conversations": [{"from": "human", "value": None}], "system": "S"},
            "conversations[0].content is null",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["a"]]},
            "history[0] must be [prompt, output]",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["a", 1]]},
            "history[0][1]' must be text, not a number",
        ),
        ({"instruction": "a", "output": "b", "history": "x"}, "'history' must be a list"),
        (
            {"prompt": [USER], "completion": [MODEL], "history": [["a", "b"]]},
            "'history' needs prompt and completion",
        ),
        (
            {"messages": [{"role": "system", "content": "A"}, USER], "system": "B"},
            "both system messages, and differ",
        ),
        ({"segments": [{"text": "a"}]}, "segments[0] must be an object with text and weight"),
        ({"segments": [{"text": "a", "weight": 1, "mask": 0}]}, "unknown fields: mask"),
        ({"input_ids": []}, "not empty"),
        ({"input_ids": [1, 2.5]}, "whole numbers"),
        ({"input_ids": [1, True]}, "whole numbers"),
        ({"input_ids": [1, -1]}, "holds -1"),
        ({"input_ids": [1, 2**31]}, "holds 2147483648"),
        ({"input_ids": [1, 2], "labels": [1]}, "as long as input_ids (2), found 1"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "look shifted by one"),
        ({"input_ids": [1, 2], "labels": [1, 300]}, "labels[1] is 300"),
        ({"input_ids": [1, 2], "labels": [1, 2], "weights": [1, 1]}, "not both"),
        ({"input_ids": [1, 2], "weights": [1, "1"]}, "weights[1] must be a number"),
        ({"input_ids": [1, 2], "completion_mask": [0, 1]}, "rename it to 'weights'"),
        ({"input_ids": [1, 2], "label": [1, 2]}, "did you mean 'labels'?"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "marks padding"),
    ],
)
def test_mistakes_name_their_field(raw: Any, message: str) -> None:
    with pytest.raises(RowError) as caught:
        row(raw)
    assert message in str(caught.value)


SYSTEM = {"role": "system", "content": "S"}
TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"messages": [USER, {**MODEL, "train_detail": [{"begin_offset": 0}]}]},
            "messages[1].train_detail",
        ),
        (
            {"conversations": [TALK[0], {**TALK[1], "train_detail": [{}]}]},
            "conversations[1].train_detail",
        ),
        ({"messages": [USER, {**MODEL, "loss": "no"}]}, "messages[1].loss must be true or false"),
        (
            {"messages": [USER, {**MODEL, "training": 0}]},
            "messages[1].training must be true or false",
        ),
        ({"messages": [{**USER, "loss": True}, MODEL]}, "assistant messages only"),
        (
            {"messages": [USER, {**MODEL, "loss": False, "train": True}]},
            "train: True and loss: False",
        ),
        ({"messages": [USER, {**MODEL, "loss_scale": 0.5}]}, "write it as 'weight'"),
        ({"messages": [USER, {**MODEL, "loss_weight": 0.5}]}, "write it as 'weight'"),
        ({"messages": [USER, {**MODEL, "loss_mask": 0}]}, "write it as 'train'"),
        ({"messages": [USER, {**MODEL, "loss_mask": False}]}, "write it as 'train'"),
        (
            {"messages": [{**USER, "images": ["a.png"]}, MODEL]},
            "messages[0].images is not read: only text",
        ),
        (
            {
                "messages": [
                    USER,
                    {**MODEL, "content": [{"type": "text", "text": "a", "train": False}]},
                ]
            },
            "messages[1].content[0].train is not read",
        ),
        ({"messages": [USER, MODEL], "label": False}, "KTO"),
        ({"messages": [USER, MODEL], "kto_tag": False}, "data.columns: {kto_tag: null}"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "column 'label' is not read: KTO"),
        ({"conversations": TALK, "label": False}, "KTO"),
        ({"dialogue": ["a", "b"], "label": False}, "KTO"),
        ({"instruction": "a", "output": "b", "label": False}, "KTO"),
        (
            {"messages": [USER, MODEL], "images": ["a.png"]},
            "column 'images' is not read: only text",
        ),
        ({"text": "a <image>", "images": ["a.png"]}, "column 'images' is not read: only text"),
        ({"conversations": TALK, "image": "a.png"}, "column 'image' is not read: only text"),
        ({"messages": [USER, MODEL], "videos": ["a"], "audios": []}, "column 'videos' is not read"),
        (
            {"messages": [USER, MODEL], "objects": {"ref": ["a"], "bbox": [[1, 2]]}},
            "column 'objects' is not read",
        ),
        ({"messages": [USER, MODEL], "functions": [{"name": "f"}]}, "write it as 'tools'"),
        (
            {"conversations": TALK[:1], "chosen": TALK[1], "rejected": TALK[1]},
            "this is preference data",
        ),
    ],
)
def test_marks_of_other_tools_are_refused_by_name(raw: Any, message: str) -> None:
    with pytest.raises(RowError) as caught:
        row(raw)
    assert message in str(caught.value)


@pytest.mark.parametrize("mark", ["train", "training", "loss", "trainable"])
@pytest.mark.parametrize("value", [True, False])
def test_marks_with_our_meaning_are_honoured(mark: str, value: bool) -> None:
    made = row({"messages": [USER, {**MODEL, mark: value}]}).messages
    assert made == (USER, {**MODEL, "train": value})
    made = row({"conversations": [TALK[0], {**TALK[1], mark: value}]}).messages
    assert made == (USER, {**MODEL, "train": value})


def test_what_says_nothing_is_no_mark() -> None:
    """Empty fields, wanted answers of KTO, and columns of data that merely share a name."""
    for extra in (
        {"train_detail": []},
        {"images": []},
        {"loss": None},
        {"image": ""},
        {"train_detail": None},
    ):
        assert row({"messages": [USER, {**MODEL, **extra}]}).messages == (USER, MODEL)
    columns = [
        {"label": True},
        {"label": 0},
        {"images": []},
        {"image": None},
        {"functions": []},
        {"objects": []},
    ]
    for extra in [
        *columns,
        {"chosen": "b", "rejected": "c"},
        {"objects": ["a table"]},
        {"system": ""},
    ]:
        assert row({"messages": [USER, MODEL], **extra}).messages == (USER, MODEL)
    assert row({"text": "so good", "label": False}).text == "so good"


def test_a_system_column_is_the_first_message() -> None:
    """Beside every format that has turns; the same text twice is one message."""
    talk = (SYSTEM, USER, MODEL)
    assert row({"messages": [USER, MODEL], "system": "S"}).messages == talk
    assert row({"messages": [SYSTEM, USER, MODEL], "system": "S"}).messages == talk
    assert row({"conversations": TALK, "system": "S"}).messages == talk
    assert row({"prompt": "Hi", "completion": "Hello", "system": "S"}).messages == talk
    assert row({"dialogue": ["Hi", "Hello"], "system": "S"}).messages == talk
    asked = row({"prompt": [USER], "completion": [MODEL], "system": "S"}).messages
    assert asked == ({**SYSTEM, "train": False}, {**USER, "train": False}, MODEL)


def test_alpaca_with_system_and_history() -> None:
    """Empty ones are as if absent; filled ones are turns, whose outputs are targets too."""
    plain = {"instruction": "Hi", "input": "", "output": "Hello"}
    assert row({**plain, "system": "", "history": []}) == Row("phrases", phrases=PAIR)
    assert row({**plain, "system": None, "history": None}) == Row("phrases", phrases=PAIR)
    earlier = (Phrase("Yo", 0.0), Phrase("Sir", 1.0))
    assert row({**plain, "system": "", "history": [["Yo", "Sir"]]}) == Row(
        "phrases", phrases=(*earlier, *PAIR)
    )
    turns = ({"role": "user", "content": "Yo"}, {"role": "assistant", "content": "Sir"})
    made = row({**plain, "system": "S", "history": [["Yo", "Sir"]]})
    messages = (SYSTEM, *turns, USER, MODEL)
    assert made == Row("messages", messages=messages, prompts=frozenset({1, 3}))  # type: ignore[arg-type]
    assert row({"prompt": "Hi", "completion": "Hello", "history": [["Yo", "Sir"]]}).phrases == (
        *earlier,
        *PAIR,
    )


def test_null_arguments_that_the_tool_does_not_have_are_left_out() -> None:
    """Nobody wrote them. Those that it has, and those of tools with unknown arguments, stay."""

    def arguments(given: Any, tools: Any) -> tuple[Any, tuple[str, ...]]:
        raw = {"messages": [USER, {**MODEL, "tool_calls": [call(given)]}], "tools": tools}
        before = json.dumps(raw)
        made = row(raw)
        assert json.dumps(raw) == before
        return messages_of(made)[1]["tool_calls"][0]["function"]["arguments"], made.notes

    schema = {"type": "object", "properties": {"city": {}, "unit": {}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    given = {"city": "Paris", "unit": None, "n": None}
    left = {"city": "Paris", "unit": None}
    assert arguments(given, [tool]) == (left, (INVENTED,))
    assert arguments(given, json.dumps([tool["function"]])) == (left, (INVENTED,))
    assert arguments(json.dumps(given), [tool]) == (given, ())  # a text is no part of a table
    assert arguments({"city": None, "n": 1}, [tool]) == ({"city": None, "n": 1}, ())
    for tools in (
        [],
        [{"name": "g", "parameters": schema}],
        [{"name": "f", "parameters": {}}],
        [{"name": "f"}],
    ):
        assert arguments(given, tools) == (given, ())
    open_schema = {**schema, "additionalProperties": True}
    assert arguments(given, [{"name": "f", "parameters": open_schema}]) == (given, ())


def test_columns_get_other_names() -> None:
    columns = {"question": "prompt", "answer": "completion", "label": None}
    raw = {"question": "Hi", "label": False, "answer": "Hello", "id": 3}
    assert renamed(raw, columns) == {"prompt": "Hi", "completion": "Hello", "id": 3}
    assert renamed(raw, {}) is raw
    assert renamed(["a", "b"], columns) == ["a", "b"]
    swapped = renamed(
        {"prompt": "a", "completion": "b"}, {"prompt": "completion", "completion": "prompt"}
    )
    assert swapped == {"completion": "a", "prompt": "b"}
    with pytest.raises(RowError, match="columns 'prompt' and 'question' would both be 'prompt'"):
        renamed({"prompt": "a", **raw}, columns)
    with pytest.raises(
        UserError, match="'promt' is a column that no format reads; did you mean 'prompt'"
    ):
        check_names({"question": "promt"})


def test_fields_that_only_a_template_may_know_are_named() -> None:
    marked = {**MODEL, "prefix": True, "id": "7", "reasoning": "Hm.", "weight": 1, "name": "x"}
    assert other_fields(row({"messages": [USER, marked]}).messages) == {"prefix", "id"}
    assert other_fields(row({"messages": [USER, MODEL]}).messages) == set()


@pytest.mark.parametrize(
    "form", ["text", "pairs", "dialogue", "messages", "sharegpt", "alpaca", "segments", "tokens"]
)
def test_a_row_of_another_shape_is_an_error(form: str) -> None:
    for raw in (5, None, {}, {"id": 1}):
        with pytest.raises(RowError, match=f"format {form}"):
            parse(raw, form)


WORDS = [
    "text",
    "prompt",
    "completion",
    "messages",
    "role",
    "content",
    "input_ids",
    "labels",
    "weights",
    "segments",
    "weight",
    "dialogue",
    "tools",
    "conversations",
    "from",
    "value",
    "instruction",
    "output",
    "input",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "type",
]
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(WORDS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(ANY)
def test_any_json_is_a_row_or_a_row_error(raw: Any) -> None:
    """Nothing but `RowError` comes out of a wrong row, and two readings of a row are equal."""
    try:
        form = detect(raw)
        made = parse(raw, form)
    except RowError:
        return
    again = json.loads(json.dumps(raw))
    assert parse(again, detect(again)) == made
