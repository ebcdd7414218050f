"""The pages of the reference that are made from the code: `python scripts/reference.py`.

The verbs come from the modules in `sftx/cli`, the Python names from `sftx.__all__`; their docstrings
are the text. `docs/settings.md` is made by `sftx schema` instead.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

from pydantic import BaseModel

import sftx
from sftx.cli import declared, verbs
from sftx.cli._map import STAGES, Verb, verb_of

DOCS = Path(__file__).parents[1] / "docs"
COMMANDS = """\
# Commands

Made from the code by `make docs`; do not edit.

`sftx VERB [file.yaml] [key=value ...]`. A verb that reads the settings of a run takes all of
[them](../settings.md) as dotted keys, besides its own keys below. `sftx VERB --help` prints the same.

| exit code | |
|---|---|
| 0 | done |
| 1 | something was found or missed: `lint`, `verify`, `doctor`, the bounds of `eval`; no trial of `sweep` finished |
| 2 | a mistake in the input; one message says what, where, and what to do |
| 3 | training stopped at numbers that are not finite |
| 75 | stopped by a signal and saved; the same command continues |
| 130 | interrupted |
"""
PYTHON = """\
# Python

Made from the code by `make docs`; do not edit. [What is public](../api.md) lists these names and
says what may change.
"""


def pages() -> dict[str, str]:
    """The text of each page by its path in `docs`."""
    return {"reference/commands.md": commands(), "reference/python.md": python()}


def commands() -> str:
    """The page of the verbs, by the stage of the work."""
    folder = Path(sftx.__file__).parent / "cli"
    found = [verb_of(folder / f"{name}.py") for name in verbs()]
    parts = [COMMANDS]
    for stage in STAGES:
        members = [verb for verb in found if verb.stage == stage]
        if members:
            parts.append(f"## {stage.capitalize()}\n")
        parts += [_verb(verb) for verb in members]
    return "\n".join(parts)


def _verb(verb: Verb) -> str:
    told = declared(verb.name)
    lines = [f"### sftx {verb.name}", "", _text(told.doc), ""]
    if verb.example:
        lines += ["<!-- not run: an example -->", "```sh", verb.example, "```", ""]
    if told.extra:
        lines += ["| key | |", "|---|---|"]
        lines += [f"| `{_key(key)}` | {_cell(text)} |" for key, text in told.extra.items()]
        lines.append("")
    return "\n".join(lines)


def _key(key: str) -> str:
    return key if key.endswith(".") else f"{key}="


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _text(doc: str) -> str:
    """A docstring as Markdown: its lists of errors become lists."""
    text = inspect.cleandoc(doc).strip()
    text = re.sub(r"^(Raises|Returns|Args):\n", r"**\1**\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"^    (\w+): ", r"* `\1`: ", text, flags=re.MULTILINE)
    return re.sub(r"^      +", "  ", text, flags=re.MULTILINE).replace("||", "\\|\\|")


def python() -> str:
    """The page of the public names."""
    parts = [PYTHON]
    for name in sftx.__all__:
        value = getattr(sftx, name)
        if name != "__version__":
            parts.append("\n".join([f"## {name}", "", *_entry(name, value)]))
    return "\n".join(parts)


def _entry(name: str, value: object) -> Iterator[str]:
    if isinstance(value, FunctionType):
        yield from _function(name, value)
    elif isinstance(value, type):
        yield _text(value.__doc__ or "")
        yield ""
        yield from _fields(value)
        yield from _methods(value)


def _function(name: str, function: FunctionType) -> Iterator[str]:
    kind = "async def" if inspect.iscoroutinefunction(function) else "def"
    signature = str(inspect.signature(function)).replace("'", "")
    line = f"{kind} {name}{signature}: ..."
    if len(line) > 100:
        line = line.replace("(", "(\n    ", 1).replace(") ->", ",\n) ->")
        line = re.sub(r", (\w+:|\*)", r",\n    \1", line)
    yield from ("<!-- not run: a signature -->", "```python", line, "```", "")
    yield from (_text(function.__doc__ or ""), "")


def _fields(owner: type) -> Iterator[str]:
    """What the objects of a class hold."""
    if issubclass(owner, BaseModel):
        yield "Its sections and settings are [the settings](../settings.md) of a run."
        yield ""
        return
    if not dataclasses.is_dataclass(owner):
        return
    rows = [field for field in dataclasses.fields(owner) if not field.name.startswith("_")]
    texts = _texts_of_fields(owner)
    yield "| field | type | |" if texts else "| field | type |"
    yield "|---|---|---|" if texts else "|---|---|"
    for field in rows:
        kind = str(field.type).replace("|", "\\|")
        text = f" {_cell(texts.get(field.name, ''))} |" if texts else ""
        yield f"| `{field.name}` | `{kind}` |{text}"
    yield ""


def _texts_of_fields(owner: type) -> dict[str, str]:
    """What the source says of each field: the docstring or the comment behind it."""
    source = inspect.getsource(owner)
    found = dict(re.findall(r"^    (\w+): [^\n#]+# ([^\n]+)$", source, re.MULTILINE))
    strings = re.findall(r'^    (\w+): [^\n]+\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL)
    return found | dict(strings)


def _methods(owner: type) -> Iterator[str]:
    """The public methods and properties that a class defines itself and describes."""
    if issubclass(owner, BaseModel):
        return
    members = {name: value for name, value in vars(owner).items() if not name.startswith("_")}
    for name, value in members.items():
        if isinstance(value, property) and value.__doc__:
            yield f"* **`{name}`**: {_cell(value.__doc__)}"
            yield ""
    for name, value in members.items():
        inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if isinstance(inner, FunctionType) and inner.__doc__:
            yield f"### {owner.__name__}.{name}"
            yield ""
            yield from _function(name, inner)


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
