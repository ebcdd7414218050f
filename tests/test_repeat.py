"""A run can be repeated from its folder, and its record reads as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_control import records, settings

import sftx
from sftx import cli
from sftx.report.model_card import public_name
from sftx.settings.load import load_config
from sftx.settings.read_yaml import parse
from sftx.settings.strict_yaml import dump
from sftx.training.export import export

ROWS = [["What is one?", "1"], {"prompt": "Two?", "completion": "é\n2"}]


def test_a_run_is_repeated_from_its_folder(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that were only in memory included; the held-out rows are the same ones."""
    given = settings(model, tmp_path / "run", eval={"every": 2}, runtime={"progress": True})
    first = sftx.train(**given)
    config = first.folder / "config.yaml"
    assert cli.main(["train", str(config)]) == 0
    assert "finished already" in capsys.readouterr().err
    again = tmp_path / "again"
    assert cli.main(["train", str(config), f"output={again}"]) == 0
    told, kept = (
        [(line["step"], line["loss"], line["eval"]) for line in records(folder)]
        for folder in (first.folder, again)
    )
    assert told == kept
    assert [step for step, _, _ in told] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _, numbers in told if numbers] == [0, 2, 4, 5]
    for name, tensor in load_file(first.folder / "model.safetensors").items():
        assert (tensor == load_file(again / "model.safetensors")[name]).all()
    assert len((again / "config.yaml").read_text().splitlines()) == len(
        config.read_text().splitlines()
    )


def test_rows_in_memory_stand_beside_those_of_files(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(["File?", "Yes."]) + "\n", encoding="utf-8")
    data = {
        "train": [{"path": str(tmp_path / "a.jsonl"), "weight": 2.0}],
        "rows": ROWS[:1],
        "eval_rows": ROWS[1:],
    }
    base = {
        **settings(model, tmp_path / "run"),
        "data": {**data, "cache": str(tmp_path / "cache"), "workers": 0},
    }
    result = sftx.train(**base)
    config = load_config(str(result.folder / "config.yaml"))
    assert config.data.rows is config.data.eval_rows is None
    train = config.model_dump()["data"]["train"]
    assert [(Path(source["path"]).name, source["weight"]) for source in train] == [
        ("a.jsonl", 2.0),
        ("rows.jsonl", 1.0),
    ]
    lines = (result.folder / "eval_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ROWS[1:]


def test_prompts_in_memory_are_asked_again(model: str, tmp_path: Path) -> None:
    asked = {
        "every": 2,
        "prompts": [["What is one?", "1"], ["Two?", "2"]],
        "general": ["A text that the base knew."],
        "new_tokens": 4,
    }
    first = sftx.train(**settings(model, tmp_path / "run", eval=asked))
    again = tmp_path / "again"
    assert cli.main(["train", str(first.folder / "config.yaml"), f"output={again}"]) == 0
    numbers = [[line["eval"] for line in records(folder)] for folder in (first.folder, again)]
    assert numbers[0] == numbers[1]
    answers = [(folder / "samples.jsonl").read_text() for folder in (first.folder, again)]
    assert answers[0] == answers[1] != ""


def texts_in(value: Any) -> list[str]:
    """All texts of a JSON value."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts_in(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


def test_the_record_holds_no_json_inside_json(model: str, tmp_path: Path) -> None:
    result = sftx.train(**settings(model, tmp_path / "run", checkpoint={"every": 2}))
    files = [result.folder / "run.json", *result.folder.glob("checkpoints/*/*.json")]
    assert len(files) >= 3
    for path in files:
        inside = [
            text
            for text in texts_in(json.loads(path.read_text()))
            if text.lstrip()[:1] in ("{", "[")
        ]
        assert not inside, f"{path.name}: {inside[0][:60]}"


def test_no_path_of_the_machine_goes_into_the_card(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = tiny.folder(home / "base-model")
    (home / "chats.jsonl").write_text(
        "".join(json.dumps([f"{i}?", f"{i}!"]) + "\n" for i in range(9))
    )
    data = {"train": str(home / "chats.jsonl"), "cache": str(home / "cache"), "workers": 0}
    base = {**settings(path, home / "run", adapter="lora"), "data": data}
    result = sftx.train(**base)
    export(result.folder, home / "exported")
    for folder in (result.folder, home / "exported"):
        card = (folder / "README.md").read_text()
        assert "base-model" in card
        assert "home" not in card
        assert "base_model:" not in card
    assert "chats.jsonl" in (result.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("owner/name:train[:10%]", "owner/name:train[:10%]"),
        ("owner/name/config:test", "owner/name/config:test"),
        ("gpt2", "gpt2"),
        ("math", "math"),
        ("/home/me/models/mine", "mine"),
        ("/home/me/models/mine/", "mine"),
        ("../models/mine", "mine"),
        ("~/mine", "mine"),
        ("/data/chats/*.jsonl", "*.jsonl"),
        ("/data/a/b:c", "b:c"),
    ],
)
def test_what_a_card_may_say_of_a_path(path: str, public: str) -> None:
    assert public_name(path) == public


TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "1e-4",
        "1e5",
        "yes",
        "no",
        "null",
        "~",
        "",
        "0123",
        "1:30",
        "2001-01-01",
        "- a",
        "a: b",
        "#c",
        "*x",
        "&y",
        "!z",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(TEXTS, VALUES, min_size=1, max_size=4))
@hypothesis_settings(deadline=None, max_examples=60)
@pytest.mark.slow
def test_settings_that_are_written_are_read_as_the_same(value: dict[str, Any]) -> None:
    problems: list[str] = []
    written = dump(value)
    read, _ = parse(written, "config.yaml", problems)
    assert repr(read) == repr(value)
    assert not problems
