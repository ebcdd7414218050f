"""Mistakes on the command line that end in a message before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from sftx.cli import main


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("chat {home}/empty", "this folder holds no tokenizer; name the folder of a model"),
        ("serve {home}/empty", "this folder holds no tokenizer; name the folder of a model"),
        ("verify {home}/model {home}/rows.jsonl json={home}/no/x.json", "there is no folder"),
        ("eval {home}/model {home}/rows.jsonl html={home}/no/x.html", "there is no folder"),
        ("eval {home}/model {home}/rows.jsonl json={home}/no/x.json", "there is no folder"),
        ("eval {home}/model {home}/rows.jsonl rows={home}/no/x.jsonl", "there is no folder"),
    ],
)
def test_a_mistake_is_named_at_once(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "model")  # no weights: nothing may be loaded
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('["What?", "That."]\n')
    assert main(command.format(home=tmp_path).split()) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said
