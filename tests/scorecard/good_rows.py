"""A good row of every format, to be broken by checks."""

from __future__ import annotations

from typing import Any

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD: dict[str, Any] = {
    "text": {"text": "some text"},
    "pairs": {"prompt": "p", "completion": "c"},
    "dialogue": ["p", "o", "p", "o"],
    "messages": {"messages": [USER, ANSWER, USER, ANSWER], "tools": []},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "do", "input": "", "output": "done"},
    "segments": {"segments": [{"text": "a", "weight": 0}, {"text": "b", "weight": 0.5}]},
    "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
}
