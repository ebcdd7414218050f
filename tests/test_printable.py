"""What a terminal would obey reaches it from nowhere: keys, paths, rows and notes are shown with
escapes.
"""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sftx.cli import main
from sftx.printable import printable
from sftx.report.progress import Progress
from sftx.types import RowError, UserError

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9d8;;\x9c\u202e"
OBEYED = [chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2066)]


def harmless(said: str) -> bool:
    return not any(character in said for character in OBEYED)


def test_what_is_escaped_and_what_is_not() -> None:
    assert printable("a\x1b[2J\x9b\u202e\ud800\x7f\r") == "a\\x1b[2J\\x9b\\u202e\\ud800\\x7f\\x0d"
    for text in ("plain\ttext\nof two lines", "naïve 🙂 שלום \u00a0", ""):
        assert printable(text) is text or printable(text) == text
    for kind in (UserError, RowError):
        assert str(kind(f"key {ESCAPE}")) == f"key {printable(ESCAPE)}"


def test_keys_and_values_of_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    written = json.dumps(ESCAPE)
    path.write_text(
        f"model: m\ndata: d\noutput: o\n{written}: 1\nbatch: {{{written}: 2, epochs: {written}}}\n"
    )
    assert main(["train", str(path), f"optim.{ESCAPE}=1"]) == 2
    said = capsys.readouterr().err
    assert harmless(said)
    assert said.count("\\x1b]0;owned") >= 3


@pytest.mark.parametrize(
    "row",
    [{"text": "x", ESCAPE: 1}, {ESCAPE: 1}, {"messages": [{"role": ESCAPE}]}, {"text": ESCAPE}],
)
def test_rows_and_their_files(
    row: dict[str, Any], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows\x1b[2J\x9b.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    asked = [
        f"model={model}",
        f"data.train={json.dumps(str(rows))}",
        f"data.cache={tmp_path / 'cache'}",
        "data.workers=0",
    ]
    for verb in ("inspect", "lint"):
        code = main([verb, *asked])
        said = capsys.readouterr()
        assert harmless(said.out + said.err)
        assert code in ((0, 1) if "text" in row else (2,)), said.err  # lint finds things in one row
        if code == 2 or verb == "inspect":
            assert "rows\\x1b[2J\\x9b.jsonl" in said.out + said.err


def test_progress_notes_and_warnings(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(True)
    progress.console = Console(file=(out := io.StringIO()), highlight=False)
    progress.say(f"note     {ESCAPE}")
    assert "\\x1b]0;owned" in out.getvalue()
    assert harmless(out.getvalue())
    rows = tmp_path / "rows\x1b[2J.jsonl"
    rows.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({ESCAPE: 1}) + "\n")
    asked = [
        f"model={model}",
        f"data.train={json.dumps(str(rows))}",
        f"data.cache={tmp_path / 'cache'}",
        "data.workers=0",
    ]
    with caplog.at_level(logging.WARNING, "sftx"):
        assert main(["plan", *asked, "data.on_bad_row=skip", "runtime.device=cpu"]) in (0, 1)
    said = capsys.readouterr()
    assert harmless(said.out + said.err + caplog.text)
    assert "50.0 % of 2 rows were dropped" in caplog.text
