"""Mistakes on the command line that end in a message before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from huggingface_hub import constants, utils

from sftx.cli import main
from sftx.hub import ask_hub
from sftx.types import UserError


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("chat {home}/empty", "this folder holds no tokenizer; name the folder of a model"),
        ("chat {home}/rows.jsonl", "a file; name the folder of a model"),
        ("serve {home}/empty", "this folder holds no tokenizer; name the folder of a model"),
        ("chat {home}/model {home}/rows.jsonl", "rows.jsonl' means nothing here; without a key it"),
        ("chat {home}/model new_tokens=3", "no key 'new_tokens'; it takes base, under, system"),
        ("serve {home}/model batch.epochs=3", "no key 'batch.epochs'; it takes base, under, host"),
        ("chat nothere", "nothere: there is no such folder or file here; a model on the hub"),
        ("inspect model=./no/where data=rows.jsonl", "./no/where: there is no such folder or file"),
        ("train {home}/rows.jsonl", "where a YAML file is expected; data is given as data="),
        ("train {home}/empty", "a folder, where a YAML file is expected; is it model="),
        ("train model=m data=d output={home}/rows.jsonl", "rows.jsonl is a file; name another"),
        ("train model=m data=d output={home}/rows.jsonl/a/b", "rows.jsonl is a file; name another"),
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


def test_a_hub_that_does_not_answer_is_asked_once_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[tuple[str, float]] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            raise ConnectionError("no network")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(utils, "get_session", Session)
    for name in ("owner/name", "gpt2"):
        with pytest.raises(UserError, match=f"{name}: there is no such.* cannot be reached"):
            ask_hub(name)
        assert capsys.readouterr().err == f"asking {constants.ENDPOINT} for {name}\n"
    assert [url for url, _ in asked] == [
        f"{constants.ENDPOINT}/{n}" for n in ("owner/name", "gpt2")
    ]
    assert max(seconds for _, seconds in asked) <= 10
    (tmp_path / "models--fetched--before").mkdir()
    ask_hub("fetched/before")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        ask_hub("owner/other")
    assert len(asked) == 2
