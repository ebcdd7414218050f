"""`sftx init`: what it sees and says, and that what it writes runs as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

import sftx
from sftx import cli
from sftx.settings.load import load_config
from sftx.starter import choose as choosing
from sftx.types import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def chats(count: int = 24) -> list[Any]:
    return [[f"What is {i}?", f"It is {i}."] for i in range(count)]


def test_what_it_writes_trains_as_it_is(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(folder, chats())
    arguments = ["init", f"model={model}", f"data={data}", "goal=instruct"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "24 rows (dialogue)" in out
    assert "row 1    user       context  What is 0?" in out
    assert "         assistant  trained  It is 0." in out
    text = (folder / "run.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=sftx.schema.json\n")
    assert json.loads((folder / "sftx.schema.json").read_text())["title"] == "sftx run"
    config = load_config("run.yaml")
    assert (config.adapter.method, config.data.max_length) == ("lora", 64)
    result = sftx.train(config)
    assert result.eval_after is not None
    assert f" {result.steps} steps" in text
    assert config.output == "runs/rows-instruct"

    assert cli.main(arguments) == 2
    assert "run.yaml is there and is not overwritten" in capsys.readouterr().err
    assert (folder / "run.yaml").read_text() == text
    assert cli.main([*arguments, "to=second.yaml"]) == 0
    assert load_config("second.yaml").output == "runs/rows-instruct-2"


def test_every_setting_has_its_reason(folder: Path, model: str) -> None:
    data = write(folder, chats())
    assert cli.main(["init", f"model={model}", f"data={data}", "goal=style"]) == 0
    lines = (folder / "run.yaml").read_text().splitlines()
    with_values = [line for line in lines if re.match(r" *\w+: ", line)]
    assert len(with_values) > 12
    assert [line for line in with_values if "  # " not in line] == []


@pytest.mark.parametrize(
    ("goal", "method", "rank"),
    [
        ("instruct", "lora", 16),
        ("style", "lora", 8),
        ("domain", "none", None),
        ("reasoning", "none", None),
    ],
)
def test_the_goal_decides_the_method(
    goal: str, method: str, rank: int | None, folder: Path, model: str
) -> None:
    data = write(folder, chats())
    assert cli.main(["init", f"model={model}", f"data={data}", f"goal={goal}"]) == 0
    config = load_config("run.yaml")
    assert config.adapter.method == method
    assert rank is None or config.adapter.rank == rank


def test_what_does_not_fit_becomes_an_adapter_or_is_refused(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(folder, chats())
    fits = choosing.choose_packing

    def small(runtime: Any, estimator: Any, *rest: Any) -> Any:
        weights = choosing.trainable(estimator.loss)
        if weights[0] == weights[1]:
            raise UserError("memory: all weights do not fit")
        return fits(runtime, estimator, *rest)

    monkeypatch.setattr(choosing, "choose_packing", small)
    assert cli.main(["init", f"model={model}", f"data={data}", "goal=domain"]) == 0
    assert load_config("run.yaml").adapter.rank == 64
    assert "# all weights do not fit into the memory" in (folder / "run.yaml").read_text()

    def never(*_: Any) -> Any:
        raise UserError("memory: a step is predicted to need 900 GiB")

    monkeypatch.setattr(choosing, "choose_packing", never)
    assert cli.main(["init", f"model={model}", f"data={data}", "goal=domain", "to=b.yaml"]) == 2
    assert "900 GiB" in capsys.readouterr().err
    assert not (folder / "b.yaml").exists()


def test_plain_text_is_counted_in_tokens(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(folder, [{"text": f"Once there were {i} foxes."} for i in range(30)])
    assert cli.main(["init", f"model={model}", f"data={data}", "goal=instruct"]) == 0
    assert "goal=domain fits, not instruct" in capsys.readouterr().out
    assert load_config("run.yaml").batch.tokens_per_step == 2048


def test_what_the_data_needs_is_set_and_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.folder(tmp_path / "base", chat=False)
    rows: list[Any] = [{"question": f"What is {i}?", "answer": "It is."} for i in range(24)]
    data = write(folder, [*rows, "not json"])
    assert cli.main(["init", f"model={base}", f"data={data}", "goal=instruct"]) == 0
    out = capsys.readouterr().out
    assert "needs    data.columns: {'question': 'prompt', 'answer': 'completion'}" in out
    assert "needs    data.template: plain (the model has no chat template" in out
    assert (
        "needs    data.on_bad_row: skip (1 bad rows are left out; the first: rows.jsonl:25" in out
    )
    config = load_config("run.yaml")
    assert config.data.columns == {"question": "prompt", "answer": "completion"}
    assert (config.data.template, config.data.on_bad_row) == ("plain", "skip")
    assert sftx.train(config.model_copy(update={"output": str(tmp_path / "run")})).steps


def test_it_asks_for_what_is_not_named(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(folder, chats())
    answers = iter(["/no/where", model, "", data, ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert cli.main(["init"]) == 0
    assert "/no/where" in capsys.readouterr().out
    assert "goal: instruct" in (folder / "run.yaml").read_text()


def test_whoever_does_not_answer_gets_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", silent)
    assert cli.main(["init"]) == 2
    assert "no model was named; nothing is written" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model= is missing, and there is no terminal to ask on"),
        (["model=MODEL"], "data= is missing"),
        (["model=/no/where", "data=rows.jsonl", "goal=style"], "/no/where"),
        (["model=MODEL", "data=nowhere.jsonl", "goal=style"], "nowhere.jsonl: no such file"),
        (["model=MODEL", "data=rows.jsonl", "goal=talk"], "goal='talk'; known are instruct:"),
        (["model=MODEL", "data=rows.jsonl"], "goal= is missing"),
        (["model=MODEL", "data=empty.jsonl", "goal=style"], "empty.jsonl"),
        (
            ["model=MODEL", "data=bad.jsonl", "goal=style"],
            "2 of 5 rows are bad; the first: bad.jsonl:4",
        ),
        (["model=MODEL", "data=odd.jsonl", "goal=style"], "no format has the columns x"),
        (["model=MODEL", "data=rows.jsonl", "goal=style", "to=run.json"], "ends in .yaml"),
        (["model=MODEL", "data=rows.jsonl", "goal=style", "to=no/"], "ends in .yaml"),
        (["run.yaml"], "'run.yaml' means nothing here"),
        (["batch.epochs=2"], "means nothing here"),
    ],
)
def test_mistakes_are_one_message_and_nothing_is_written(
    arguments: list[str],
    message: str,
    folder: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder, chats(3))
    write(folder, [{"x": 1}], "odd.jsonl")
    write(folder, [*chats(3), "no", "no"], "bad.jsonl")
    (folder / "empty.jsonl").write_text("")
    assert cli.main(["init", *(one.replace("MODEL", model) for one in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert list(folder.glob("*.yaml")) == []


def test_a_schema_of_somebody_else_is_not_overwritten(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(folder, chats())
    (folder / "sftx.schema.json").write_text("{}")
    assert cli.main(["init", f"model={model}", f"data={data}", "goal=style"]) == 2
    assert "was not written by sftx" in capsys.readouterr().err
    assert not (folder / "run.yaml").exists()


def test_rows_with_tools_get_a_template_that_writes_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.folder(tmp_path / "base", chat=False, max_position_embeddings=2048)
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "lamp"}}}
    tool = {"name": "find", "description": "Find.", "parameters": {"type": "object"}}
    talk = [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "There."},
        {"role": "assistant", "content": "It is there."},
    ]
    rows: list[Any] = [{"messages": [talk[0], talk[3]]} for _ in range(20)]
    rows += [{"messages": talk, "tools": [{"type": "function", "function": tool}]}] * 4
    data = write(folder, rows)
    assert cli.main(["init", f"model={base}", f"data={data}", "goal=instruct"]) == 0
    out = capsys.readouterr().out
    assert "data.template: chatml (the model has no chat template, and the rows call tools)" in out
    assert "24 rows (messages)" in out
    data_settings = load_config("run.yaml").data
    assert (data_settings.template, data_settings.on_bad_row) == ("chatml", "stop")
