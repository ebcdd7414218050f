"""Turns and the chat template that writes them: one rule for every shape of a dialogue, and one
error of the run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

import sftx

SHAPES: dict[str, Any] = {
    "dialogue": ["One?", "1", "Two?", "2"],
    "messages": {
        "messages": [
            {"role": role, "content": text}
            for role, text in zip(
                ["user", "assistant"] * 2, ["One?", "1", "Two?", "2"], strict=True
            )
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": role, "value": text}
            for role, text in zip(["human", "gpt"] * 2, ["One?", "1", "Two?", "2"], strict=True)
        ]
    },
}
PAIRS: dict[str, Any] = {
    "dialogue": ["One?", "1"],
    "pairs": {"prompt": "One?", "completion": "1"},
    "alpaca": {"instruction": "One?", "output": "1"},
    "messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}],
}


@pytest.mark.parametrize("shapes", [SHAPES, PAIRS], ids=["two answers", "one answer"])
@pytest.mark.parametrize(
    ("chat", "template"), [(True, "auto"), (False, "plain"), (False, "chatml"), (False, "none")]
)
def test_the_same_dialogue_is_the_same_tokens_in_every_shape(
    shapes: dict[str, Any], chat: bool, template: str
) -> None:
    tokenizer = tiny.tokenizer(chat)
    encoded = {name: sftx.encode(row, tokenizer, template=template) for name, row in shapes.items()}
    found = {
        name: [(e.ids.tolist(), e.weights.tolist()) for e in examples]
        for name, examples in encoded.items()
    }
    assert all(one == found["dialogue"] for one in found.values()), found


@pytest.mark.parametrize("row", [*SHAPES.values(), *PAIRS.values()])
def test_turns_without_a_template_are_refused_in_every_shape(row: Any) -> None:
    with pytest.raises(sftx.UserError, match=r"no chat template.*data\.template: plain"):
        sftx.encode(row, tiny.tokenizer(chat=False))
    assert sftx.encode("a text", tiny.tokenizer(chat=False))


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
@pytest.mark.parametrize("name", ["dialogue", "messages"])
def test_a_missing_template_is_one_error_of_the_run(
    tmp_path: Path, name: str, on_bad_row: Any
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(SHAPES[name]) + "\n" for _ in range(50)), encoding="utf-8")
    with pytest.raises(sftx.UserError) as caught:
        sftx.train(
            model=tiny.folder(tmp_path / "base", chat=False),
            data={
                "train": str(path),
                "on_bad_row": on_bad_row,
                "cache": str(tmp_path / "cache"),
                "workers": 0,
            },
            output=str(tmp_path / "run"),
            runtime={"progress": False},
        )
    message = str(caught.value)
    assert message.startswith(
        f"{path} ({name}): the rows are turns, and the tokenizer has no chat template"
    )
    assert "bad row" not in message
    assert "\n" not in message


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<é>"}}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": 'Adds "numbers".', "parameters": {}},
}
WITH_TOOLS: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1, and 2 + 2?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "2 and 4."},
        {"role": "user", "content": "3 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "6"},
        {"role": "assistant", "content": "6."},
    ],
    "tools": [TOOL],
}
WRITTEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<é>"}}\n</tool_call>'
EXPECTED = (
    "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist "
    "with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "add", "description": "Adds \\"numbers\\".", '
    '"parameters": {}}}\n'
    "</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\n"
    "</tool_call><|im_end|>\n<|im_start|>user\n1 + 1, and 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    f"⟦Let me see.\n{WRITTEN_CALL}\n{WRITTEN_CALL}<|im_end|>⟧\n"
    "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n⟦2 and 4.<|im_end|>⟧\n<|im_start|>user\n3 + "
    "3?<|im_end|>\n<|im_start|>assistant\n"
    f"⟦{WRITTEN_CALL}<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n6\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n⟦6.<|im_end|>⟧"
)


@pytest.mark.parametrize(
    "as_text", [False, True], ids=["arguments as an object", "arguments as text"]
)
def test_the_bundled_chatml_has_tools(as_text: bool) -> None:
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    row = json.loads(json.dumps(WITH_TOOLS))
    for message in row["messages"] if as_text else ():
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(
                call["function"]["arguments"], ensure_ascii=False
            )
    (example,) = sftx.encode(row, tokenizer, template="chatml")
    text, before = "", 0.0
    pieces: list[int] = []
    for token, weight in zip(example.ids.tolist(), example.weights.tolist(), strict=True):
        if weight != before:
            text += str(tokenizer.decode(pieces)) + ("⟦" if weight else "⟧")
            pieces, before = [], weight
        pieces.append(token)
    text += str(tokenizer.decode(pieces)) + "⟧" * bool(before)
    assert text == EXPECTED
