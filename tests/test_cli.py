"""The command line: dispatch, help, exit codes, and what is never imported for them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import sftx
from sftx import cli
from sftx.cli._groups import keys_of
from sftx.cli._map import OTHER, STAGES, overview, verb_of
from sftx.settings.describe import settings
from sftx.settings.schema import Config
from sftx.types import UserError


def verb(monkeypatch: pytest.MonkeyPatch, run: Callable[..., int], **attributes: object) -> None:
    """Put a verb called `train` in the place of the real one."""
    module = ModuleType("sftx.cli.train", "Stands in for a verb.")
    module.run = run  # type: ignore[attr-defined]
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, "sftx.cli.train", module)


@pytest.mark.parametrize("key", ["json", "html"])
def test_a_file_without_its_folder_is_refused_before_the_work(
    key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def run(config: Config, json: str = "", html: str = "") -> int:
        calls.append(json or html)
        return 0

    verb(monkeypatch, run, EXTRA={"json": "A file.", "html": "A page."}, DEFAULTS=["output=none"])
    there, missing = tmp_path / "there", tmp_path / "missing" / "out"
    assert cli.main(["train", "model=m", "data=d", f"{key}={missing}"]) == 2
    said = f"sftx train {key}={missing}: there is no folder {missing.parent}"
    assert said in capsys.readouterr().err
    assert cli.main(["train", "model=m", "data=d", f"{key}={tmp_path}"]) == 2
    assert "this is a folder" in capsys.readouterr().err
    assert calls == []
    assert cli.main(["train", "model=m", "data=d", f"{key}={there}"]) == 0
    assert calls == [str(there)]


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
        (
            ["train", "a.yaml", "b.yaml"],
            "error: sftx train: one YAML file at most: 'a.yaml', then 'b.yaml'",
        ),
        (["train", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
        (["train", "runs/lr=1e-4/run.yaml"], "error: runs/lr=1e-4/run.yaml: no such file"),
        (["schema", "formt=json"], "error: sftx schema: no key 'formt'; did you mean `format`?"),
        (
            ["schema", "run.yaml"],
            "error: sftx schema: 'run.yaml' means nothing here; it takes format=...",
        ),
        (
            ["schema", "format=xml"],
            "error: sftx schema: format='xml'; allowed: json, markdown, python",
        ),
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

    run = ["train", "model=m", "data=d", "output=o", "runtime.progress=false"]
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
    assert [
        name for name, doc in cli.verbs().items() if f"  {name} " not in overview or not doc
    ] == []
    assert max(map(len, overview.splitlines())) <= 100


def test_every_verb_declares_its_stage_and_an_example_that_names_it() -> None:
    """The map is made from them."""
    folder = Path(cli.__file__).parent
    found = [verb_of(path) for path in sorted(folder.glob("[a-z]*.py"))]
    assert [verb.name for verb in found if verb.stage not in STAGES] == []
    wrong = [verb.name for verb in found if f"sftx {verb.name} " not in f"{verb.example} "]
    assert wrong == []


def test_the_map_has_a_verb_that_declares_no_stage_too(tmp_path: Path) -> None:
    path = tmp_path / "later.py"
    path.write_text('"""Do it: `sftx later x`. More."""\n')
    later = verb_of(path)
    assert later == ("later", OTHER, "Do it.", "")
    shown = overview("usage: sftx", [later, later._replace(name="now", stage="train")])
    assert shown.index("\ntrain\n") < shown.index("\nother\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "a verb comes first; '--dry-run': "),
        (["train", "--dry-run"], "`sftx plan` shows the settings"),
        (["train", "--learning_rate", "1"], "it is `optim.learning_rate`"),
        (["train", "--batch.epochs=2"], "write batch.epochs=2"),
        (["train", "--foo"], "`sftx VERB --help` lists them"),
        (["--help", "trian"], "no verb 'trian'; did you mean `train`?"),
    ],
)
def test_a_flag_is_answered_by_what_does_the_same_here(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["train", "help"], ["help", "train"], ["--help", "train"], ["train", "x=1", "-h"]]
)
def test_help_may_stand_anywhere(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: sftx train ")


def test_what_a_verb_says_of_itself_is_read_without_importing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in cli.verbs():
        module = importlib.import_module(f"sftx.cli.{name}")
        imported = cli.declared(name)
        monkeypatch.delitem(sys.modules, f"sftx.cli.{name}")
        assert cli.declared(name) == imported
        own = getattr(module, "EXTRA", {})
        assert imported.extra == own | keys_of(imported.groups)
        assert len(imported.extra) == len(own) + len(keys_of(imported.groups))
        taken = {"bounds" if key.endswith(".") else key for key in own}
        assert taken | {*imported.groups} <= {*imported.takes}


@pytest.mark.parametrize("name", [name for name in cli.verbs() if name not in cli.PRINTS])
def test_every_verb_gives_a_sign_of_life_before_anything_slow(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is shown before the verb's module is imported, and whatever of torch or data comes with
    that.
    """
    shown: list[str] = []

    def instead(module: str) -> ModuleType:
        shown.append(capsys.readouterr().err)
        stand_in = ModuleType(module)
        stand_in.run = lambda *_, **__: 0  # type: ignore[attr-defined]
        return stand_in

    monkeypatch.setattr(cli, "import_module", instead)
    told = cli.declared(name)
    arguments = ["model=m", "data=d", "output=o"] if "config" in told.takes else []
    if told.settings:
        arguments = ["model=m"]
    assert cli.main([name, *arguments]) == 0
    assert shown == [" ".join(["start    sftx", name, *arguments]) + "\n"]
    if arguments:
        assert cli.main([name, *arguments, "runtime.progress=false"]) == 0
        assert shown[1:] == [""]


def test_the_sign_of_life_comes_within_a_second() -> None:
    """Measured as work of this process, which on a free machine is the time that passes."""
    code = (
        "import os, sys, time\n"
        "from sftx import cli\n"
        "def instead(module):\n"
        "    print(sum(os.times()[:2]))\n"
        "    sys.exit()\n"
        "cli.import_module = instead\n"
        "cli.main(['plan', 'model=m', 'data=d'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("start    sftx plan")
    assert float(done.stdout) < 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["plan", "--help"],
        ["schema"],
        ["completion", "bash"],
        ["train", "x=1"],
    ],
)
def test_nothing_heavy_is_imported_before_work_starts(arguments: list[str]) -> None:
    code = (
        "import sys; from sftx.cli import main; main(sys.argv[1:]); print({'torch', "
        "'transformers'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


def test_python_m_sftx_is_sftx() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sftx", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"sftx {sftx.__version__}\n")
    done = subprocess.run(
        [sys.executable, "-m", "sftx", "train"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
