"""The map of the verbs: by the stage of the work, with one example each.

A verb says where it belongs in two constants of its file, `STAGE` and `EXAMPLE`. They are read
without importing it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

STAGES = (
    "begin",
    "look at data",
    "plan",
    "train",
    "judge",
    "talk",
    "hand over",
    "prove",
    "set up",
)
"""In the order in which a person meets them."""
OTHER = "other"
WIDTH = 100


class Verb(NamedTuple):
    """What the map says of a verb."""

    name: str
    stage: str
    doc: str  # one sentence
    example: str


def verb_of(path: Path) -> Verb:
    """The verb in the file `path`; one that declares no stage is in `OTHER`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts: dict[str, str] = {}
    for node in tree.body:
        match node:
            case ast.Assign(
                targets=[ast.Name(id="STAGE" | "EXAMPLE" as name)],
                value=ast.Constant(value=str() as text),
            ):
                texts[name] = text
    return Verb(
        path.stem,
        texts.get("STAGE", OTHER),
        _first_sentence(ast.get_docstring(tree) or ""),
        texts.get("EXAMPLE", ""),
    )


def _first_sentence(doc: str) -> str:
    """The first sentence of a docstring, without the example that may follow in it."""
    paragraph = " ".join(doc.partition("\n\n")[0].split())
    sentence = paragraph.partition(": `")[0].partition(". ")[0]
    return sentence.rstrip(".:") + "."


def overview(usage: str, verbs: Iterable[Verb]) -> str:
    """All verbs by their stage."""
    found = list(verbs)
    width = max(len(verb.name) for verb in found)
    lines = [
        "Supervised fine-tuning of causal language models in which every token is accounted for.",
        "",
        usage,
    ]
    for stage in (*STAGES, OTHER):
        members = [verb for verb in found if verb.stage == stage]
        if members:
            lines += ["", stage]
        for verb in members:
            lines += _entry(verb, width)
    lines += [
        "",
        "`sftx VERB --help` lists what a verb takes; `sftx train --help` lists every setting of a "
        "run.",
    ]
    return "\n".join(lines)


def _entry(verb: Verb, width: int) -> list[str]:
    indent = " " * (width + 4)
    first, *more = wrap(verb.doc, WIDTH - len(indent)) or [""]
    lines = [f"  {verb.name:{width}}  {first}"]
    lines += [indent + line for line in more]
    if verb.example:
        lines.append(f"{indent}$ {verb.example}")
    return lines
