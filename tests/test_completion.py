"""Shell completion: the words are those of the schema, and bash does with them what it should."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sftx import cli
from sftx.cli._words import literals, words
from sftx.settings.describe import settings

COMPLETE = """
source "$1"
line="$2"
COMP_LINE="$line"; COMP_POINT=${#line}; COMP_WORDBREAKS=" ="
read -ra COMP_WORDS <<< "${line//=/ = }"
[[ "$line" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_sftx 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        done = subprocess.run(
            [sys.executable, "-m", "sftx", "completion", shell],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""  # it would be shown at the start of every shell
        (folder / shell).write_text(done.stdout)
    return folder


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sftx tr", ["train"]),
        ("sftx train optim.sched", ["optim.schedule="]),
        ("sftx train optim.schedule=c", ["cosine", "constant"]),
        ("sftx train runtime.progress=", ["true", "false"]),
        ("sftx train adapter=dor", ["dora"]),
        ("sftx export dty", ["dtype="]),
        ("sftx export adapter=lor", [""]),
    ],
)
def test_bash_completes(line: str, expected: list[str], scripts: Path) -> None:
    command = ["bash", "-c", COMPLETE, "bash", str(scripts / "bash"), line]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=scripts)
    assert done.stdout.removesuffix("\n").split("\n") == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_another_shell_reads_its_script(shell: str, scripts: Path) -> None:
    text = (scripts / shell).read_text()
    for verb in cli.verbs():
        assert verb in text
    assert "optim.learning_rate=" in text
    assert "'cosine linear constant wsd'" in text or "optim.schedule=wsd" in text
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    subprocess.run([shell, "-n", str(scripts / shell)], check=True)


def test_the_words_are_those_of_the_schema() -> None:
    found = words()
    assert {*found.keys} == {*cli.verbs()}
    assert {*settings()} <= {*found.keys["train"]}
    assert found.values["data.too_long"][0] == "split"
    assert found.values["adapter"] == found.values["adapter.method"]
    assert literals(int | None) == []


@pytest.mark.parametrize("arguments", [[], ["tcsh"], ["bash", "zsh"], ["shell=bash"]])
def test_another_shell_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", *arguments]) == 2
    assert "sftx completion" in capsys.readouterr().err
