"""The tutorial as a notebook: `python scripts/notebook.py` writes docs/tutorial.ipynb and runs it.

The page `docs/tutorial.md` is the source: its text becomes text, its blocks become cells. Running
takes the packages in requirements-docs.txt, and some minutes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "tutorial.md"
NOTEBOOK = DOCS / "tutorial.ipynb"
_BLOCK = re.compile(r"(<!-- not run:[^>]*-->\n)?```(\w+)([^\n]*)\n(.*?)```\n", re.DOTALL)
PLAIN = """#!/bin/sh
exec env -u FORCE_COLOR -u CLICOLOR_FORCE TERM=dumb "{}" -m sftx "$@" 2>&1
"""
"""sftx for the cells: what it prints into a file, with neither colours nor progress that redraws."""
LONGEST = 1200  # seconds of one cell
ITSELF = "This page is a [notebook](tutorial.ipynb) too, with what was printed.\n\n"

Cell = dict[str, Any]


def cells() -> list[Cell]:
    """The cells of the notebook, without outputs."""
    text = PAGE.read_text(encoding="utf-8").replace(
        "This page is a [notebook](tutorial.ipynb) too, with what was printed.\n\n", ""
    )
    found: list[Cell] = []
    end = 0
    for block in _BLOCK.finditer(text):
        _add_text(found, text[end : block.start()])
        mark, language, info, code = block.groups()
        if mark or language not in ("python", "sh", "yaml"):
            _add_text(found, block[0].removeprefix(mark or ""))
        else:
            _add_code(found, language, info, code)
        end = block.end()
    _add_text(found, text[end:])
    return found


def _add_text(found: list[Cell], text: str) -> None:
    if not text.strip():
        return
    if found and found[-1]["cell_type"] == "markdown":
        text = f"{found[-1]['source']}\n\n{text.strip()}"
        found.pop()
    found.append(
        {
            "cell_type": "markdown",
            "id": f"cell-{len(found)}",
            "metadata": {},
            "source": _links(text.strip()),
        }
    )


def _links(text: str) -> str:
    """Links to other pages, which a notebook elsewhere does not find, as their words alone."""
    return re.sub(r"\[([^\]]+)\]\([\w./-]+\.md[^)]*\)", r"\1", text)


def _add_code(found: list[Cell], language: str, info: str, code: str) -> None:
    title = re.search(r'title="([^"]+)"', info)
    heads = {"python": "", "sh": "%%bash\n", "yaml": f"%%writefile {title[1] if title else ''}\n"}
    found.append(
        {
            "cell_type": "code",
            "id": f"cell-{len(found)}",
            "execution_count": None,
            "metadata": {},
            "outputs": [],
            "source": heads[language] + code.strip(),
        }
    )


def notebook(cells: list[Cell]) -> dict[str, object]:
    """The notebook as it is written to a file."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def run() -> dict[str, object]:
    """Run the notebook in a fresh folder, with `sftx` of this environment on the path."""
    # Not on everybody's machine, and in no other file.
    nbformat, nbclient = import_module("nbformat"), import_module("nbclient")
    made = nbformat.reads(json.dumps(notebook(cells())), as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "tutorial")
        home.mkdir()
        command = Path(folder, "sftx")
        command.write_text(PLAIN.format(sys.executable))
        command.chmod(0o755)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        os.environ["COLUMNS"] = "100"
        nbclient.NotebookClient(
            made, timeout=LONGEST, resources={"metadata": {"path": str(home)}}
        ).execute()
        text = nbformat.writes(made).replace(str(home), "/home/you").replace(folder, "/home/you")
    done: dict[str, Any] = json.loads(text)
    return notebook([_plain(cell) for cell in done["cells"]])


def _plain(cell: Cell) -> Cell:
    """A cell whose outputs are one text, without the warnings of libraries and the times."""
    cell = {**cell, "source": "".join(cell["source"])}
    if cell["cell_type"] != "code":
        return cell
    texts = ["".join(out["text"]) for out in cell["outputs"] if out.get("name") == "stdout"]
    text = re.sub(r"^.*\r.*\n", "", "".join(texts), flags=re.MULTILINE)  # bars that redraw
    errors = [out for out in cell["outputs"] if out["output_type"] == "error"]
    stream = {"output_type": "stream", "name": "stdout", "text": text}
    return {**cell, "metadata": {}, "outputs": [*([stream] if texts else []), *errors]}


def main() -> None:
    """Write the notebook with its outputs."""
    NOTEBOOK.write_text(json.dumps(run(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
