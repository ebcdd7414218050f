"""The code in the documentation: every block of every page, and how it is run.

A block is fenced with its language. Beside them a page has what a reader of the built page does not
see: `<!-- not run: REASON -->` above a block that cannot run here, and `<!-- hidden LANGUAGE`, code,
`-->` for what a page needs before its first command.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent
from unittest import mock

import tiny
import yaml

import sftx
from sftx import cli
from sftx.settings.describe import settings
from sftx.settings.load import load_config
from sftx.settings.schema import SHORT_FORMS, Config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LANGUAGES = {"sh", "python", "yaml", "json", "text"}
"""`text` is what a program prints, or a formula."""
HUB_MODELS = (
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen3-0.6B",
)
"""Names that pages use; small new models stand in for them."""
VERBS = cli.verbs()
declared = cache(cli.declared)
_BLOCK = re.compile(
    r"^<!-- hidden (?P<hidden>\w+)\n(?P<code>.*?)^-->$"
    r"|^(?:[ ]*<!-- not run: (?P<reason>[^>]+?) -->\n\n?)?"
    r"(?P<indent>[ ]*)```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_INLINE = re.compile(r"(?<!`)`(sftx [a-z][^`]*)`(?!`)")
_PLACEHOLDER = re.compile(r"\.\.\.|\b[A-Z]{2,}\b=|=[A-Z]+\b|=$|\bVERB\b")


@dataclass(frozen=True)
class Block:
    """A piece of code in a page."""

    page: str
    line: int
    language: str
    text: str
    title: str  # the file that the block is, if the page names it
    not_run: str  # why it cannot run in a test; empty = it runs

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    """A page's path in the project."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, hidden ones included, in their order."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        title = re.search(r'title="([^"]+)"', match["info"] or "")
        code = match["code"] if match["hidden"] else dedent(match["text"])
        found.append(
            Block(
                name_of(page),
                line,
                match["hidden"] or match["language"],
                code,
                title[1] if title else "",
                match["reason"] or "",
            )
        )
    return found


def inline_commands(page: Path) -> list[str]:
    """The commands of sftx in the sentences of a page, those with a placeholder left out."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    commands = [" ".join(each.split()) for each in _INLINE.findall(text)]
    return [_with_settings(each) for each in commands if not _PLACEHOLDER.search(each)]


def _with_settings(command: str) -> str:
    """The command with a file of settings, where it names none and needs one."""
    verb, *arguments = _words(command)[1:]
    if verb not in VERBS or "config" not in declared(verb).takes:
        return command
    named = [word for word in arguments if "=" not in word or word.startswith("model=")]
    return command if named else " ".join(["sftx", verb, "run.yaml", *arguments])


def commands_of(block: Block) -> list[str]:
    """The commands of sftx in a block for the shell."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("sftx ")]


def _words(command: str) -> list[str]:
    """The words of a command up to what belongs to the shell."""
    words = shlex.split(command, comments=True)
    ends = [at for at, word in enumerate(words) if word in ("|", ">", "<", "&&", ";", "&")]
    return words[: min(ends, default=len(words))]


def check_command(command: str, folder: Path) -> None:
    """Read a command of sftx as the command line does, up to the work itself.

    Values are checked with the settings of `run.yaml` in `folder`, whatever file is named.
    """
    _, *words = _words(command)
    verb = words[0] if words else "help"
    if verb in VERBS and "overrides" in declared(verb).takes:
        keys = {word.partition("=")[0] for word in words[1:] if "=" in word}
        unknown = keys - settings().keys() - declared(verb).extra.keys() - SHORT_FORMS.keys()
        assert not unknown, f"{command}: {unknown}"
        return
    for word in words[1:]:
        if word.endswith(".yaml") and not Path(word).exists():
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).write_text((folder / "run.yaml").read_text())
    calls: list[str] = []
    stand_in = mock.Mock()
    stand_in.run.side_effect = lambda *_, **__: calls.append(verb) or 0
    with mock.patch.multiple(
        cli, _module=lambda *_: stand_in, verbs=lambda: VERBS, declared=declared
    ):
        code = cli.main(words)
    assert code == 0, command
    assert calls or verb not in VERBS or "help" in command, command


def check_settings(text: str, file: Path) -> None:
    """Read a block of settings; what a part of a file leaves out is put in."""
    file.write_text(text, encoding="utf-8")
    given = yaml.safe_load(text)
    missing = [f"{name}=x" for name in ("model", "data", "output") if name not in given]
    data = given.get("data")
    if isinstance(data, dict) and not {"train", "rows"} & data.keys():
        missing.append("data.train=x")
    if isinstance(given.get("model"), dict) and "path" not in given["model"]:
        missing.append("model.path=x")
    load_config(str(file), missing)
    assert given.keys() <= Config.model_fields.keys()


def rows_of(block: Block) -> list[object]:
    """The rows that a block of JSON shows: one value, or one in each line."""
    try:
        return [json.loads(block.text)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in block.text.splitlines() if line.strip()]


def check_rows(block: Block) -> None:
    """Each row becomes examples."""
    for row in rows_of(block):
        assert sftx.encode(row, tiny.tokenizer(chat=False), template="chatml"), str(block)


@contextmanager
def _typed(text: str) -> Iterator[None]:
    """`text` on the standard input."""
    with mock.patch.object(sys, "stdin", io.StringIO(text)):
        yield


def _shell(block: Block) -> None:
    """Run the lines of a block: sftx in this process, where the block has nothing else."""
    lines = [line.strip() for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
    simple = [line for line in lines if re.fullmatch(r"sftx [^|<>&;$*~]*", line.partition(" #")[0])]
    if simple == lines:
        for line in lines:
            with _typed("Hello.\n"):
                assert cli.main(_words(line)[1:]) == 0, f"{block}: {line}"
        return
    place = Path("bin").resolve()
    place.mkdir(exist_ok=True)
    (place / "sftx").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sftx "$@"\n')
    (place / "sftx").chmod(0o755)
    path = f"{place}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(
        ["bash", "-euc", block.text],
        env=environment,
        input="Hello.\n",
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}:\n{done.stdout}\n{done.stderr}"


def run(blocks: list[Block]) -> None:
    """Run the blocks of a page one after the other in the working folder; Python blocks share their
    names.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        if block.title and not block.not_run:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text, encoding="utf-8")
        if block.not_run:
            continue
        if block.language == "python":
            code = "\n" * block.line + block.text
            exec(compile(code, block.page, "exec"), names)
        elif block.language == "sh":
            _shell(block)
