"""Bad rows, kind by kind: the place and the reason lead, what to do about bad rows follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_tokenizers import ours

from sftx.data.dataset import load_corpora
from sftx.settings.keywords import DataSettings
from sftx.settings.load import make_config
from sftx.types import UserError

BAD_ROWS = {
    "no JSON": "not json",
    "cut off": '{"prompt": "half a ro',
    "not an object": "17",
    "empty": "{}",
    "a misspelt column": '{"promt": "p", "completion": "c"}',
    "a column missing": '{"prompt": "p"}',
    "another format": '["p", "c"]',
    "a number": '{"prompt": "p", "completion": 7}',
    "null": '{"prompt": "p", "completion": null}',
    "half a character": r'{"prompt": "a\ud800b", "completion": "c"}',
    "messages and text": '{"prompt": [], "completion": "c"}',
    "tools without messages": '{"prompt": "p", "completion": "c", "tools": [{}]}',
    "deep": '{"prompt": ' + "[" * 9999 + "]" * 9999 + ', "completion": "c"}',
    "many columns": json.dumps(
        {"prompt": "p", "completion": "c"} | {f"k{i}": 1 for i in range(1200)}
    ),
}


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_told_by_place_then_reason_then_what_to_do(
    kind: str, at: int, tmp_path: Path
) -> None:
    good, hint = (
        '{"prompt": "p", "completion": "c"}',
        "\n(data.on_bad_row=skip leaves bad rows out and lists them)",
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good] * (at - 1) + [BAD_ROWS[kind], good]) + "\n")
    data: DataSettings = {
        "train": str(path),
        "cache": str(tmp_path / "cache"),
        "workers": 0,
        "template": "none",
    }
    with pytest.raises(UserError) as caught:
        load_corpora(make_config(model="unused", output="unused", data=data), ours(), 64)
    said = str(caught.value)
    if kind == "another format" and at == 1:  # the first row decides: the second is the bad one
        assert said.startswith(f"{path}:2: ")
    else:
        assert said.startswith(f"{path}:{at}: ")
    assert said.endswith(hint)
    assert len(said) > len(f"{path}:{at}: {hint}") + 10
    assert "on_bad_row" not in said[: -len(hint)]
