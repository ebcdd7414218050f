"""The command line: dispatch, help, exit codes, and what is never imported for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

import sftx
from sftx import cli
from sftx.config import Config
from sftx.schema import settings
from sftx.types import UserError


def verb(monkeypatch: pytest.MonkeyPatch, run: Callable[..., int], **attributes: object) -> None:
    """Put a verb called `train` in the place of the real one."""
    module = ModuleType("sftx.cli.train", "Stands in for a verb.")
    module.run = run  # type: ignore[attr-defined]
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, "sftx.cli.train", module)


def test_a_verb_gets_its_config_and_its_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Config, str]] = []

    def run(config: Config, row: str = "1") -> int:
        calls.append((config, row))
        return 7

    verb(monkeypatch, run, EXTRA={"row": "Which row."}, DEFAULTS=["output=none"])
    assert cli.main(["train", "model=m", "data=d", "row=3", "batch.epochs=2"]) == 7
    config, row = calls[0]
    assert (config.output, config.batch.epochs, row) == ("none", 2, "3")
    assert cli.main(["train", "model=m", "data=d", "output=o", "data.rwo=3"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: no verb 'trian'; did you mean `train`?"),
        (["zzz"], "error: no verb 'zzz'; known: "),
        (["train", "--lr", "3"], "error: sftx train: '--lr': settings are written key=value"),
        (["train", "a.yaml", "b.yaml"], "error: sftx train: one YAML file at most: 'a.yaml', then 'b.yaml'"),
        (["train", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
        (["train", "runs/lr=1e-4/run.yaml"], "error: runs/lr=1e-4/run.yaml: no such file"),
        (["schema", "formt=json"], "error: sftx schema: no key 'formt'; did you mean `format`?"),
        (["schema", "run.yaml"], "error: sftx schema: 'run.yaml' means nothing here; it takes format=..."),
        (["schema", "format=xml"], "error: sftx schema: format='xml'; allowed: json, markdown, python"),
        (["schema", "format=json", "format=markdown"], "error: sftx schema: format: given twice"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert not captured.out


def test_exit_codes_of_interruption_and_of_errors_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Config) -> int:
        raise KeyboardInterrupt

    def mistaken(config: Config) -> int:
        raise UserError("rows.jsonl:3: prompt: missing")

    run = ["train", "model=m", "data=d", "output=o"]
    verb(monkeypatch, interrupted)
    assert cli.main(run) == 130
    verb(monkeypatch, mistaken)
    assert cli.main(run) == 2
    assert capsys.readouterr().err == "interrupted\nerror: rows.jsonl:3: prompt: missing\n"


def test_help_is_made_from_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert [key for key in settings() if f"  {key}\n" not in text] == []
    assert cli.main(["export", "--help"]) == 0
    assert "usage: sftx export PATH [key=value ...]" in capsys.readouterr().out
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert [name for name, doc in cli.verbs().items() if f"  {name} " not in overview or not doc] == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["schema"], ["train", "x=1"]])
def test_nothing_heavy_is_imported_before_work_starts(arguments: list[str]) -> None:
    code = (
        "import sys; from sftx.cli import main; main(sys.argv[1:]); print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


def test_python_m_sftx_is_sftx() -> None:
    done = subprocess.run([sys.executable, "-m", "sftx", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"sftx {sftx.__version__}\n")
    done = subprocess.run([sys.executable, "-m", "sftx", "train"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
