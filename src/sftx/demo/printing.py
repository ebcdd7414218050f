"""What the quick start prints, for somebody who has never fine-tuned a model; the words are in
`story.txt`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sftx.data.encode_row import encode
from sftx.data.tokenizer import Tokenizer
from sftx.demo.tiny_model import END
from sftx.demo.village import Question, Village

MOMENTS = ("untrained", "after stage 1", "after stage 2")
_STORY = Path(__file__).with_name("story.txt").read_text(encoding="utf-8")
_PARTS = dict(re.findall(r"^\[(\w+)\]\n(.*?)\n(?=\n\[|\Z)", _STORY, re.MULTILINE | re.DOTALL))
_console = Console(highlight=False, markup=False)


def tell(part: str, **facts: object) -> None:
    """Print a part of the story; its title, if it has one, stands out on a terminal."""
    title, line, text = _PARTS[part].format(**facts).rpartition("===\n")
    heading = (f"\n{title}{line}", "bold cyan")
    _console.print(Text.assemble(heading, text), soft_wrap=True)


def show(text: str) -> None:
    """Print a paragraph of the corpus."""
    _console.print(f"{text}\n")


def show_targets(row: object, tokenizer: Tokenizer) -> None:
    """Print a row of data as the model sees it, a sentence a line, with ^ under every token that is
    a target.
    """
    _console.print()
    for example in encode(row, tokenizer):
        pieces = [tokenizer.decode([token]) for token in example.ids]
        text = ""
        marks = ""
        for number, piece in enumerate(pieces):
            mark = "^" if example.weights[number] else " "
            text += piece
            marks += mark * len(piece)
            is_before_end = pieces[number + 1 : number + 2] == [END]
            if piece == END or (piece == "." and not is_before_end):
                _print_sentence(text, marks)
                text = ""
                marks = ""
    _console.print()


def _print_sentence(text: str, marks: str) -> None:
    """Print a line, and its marks beneath it where there are any; without the space before it."""
    if text.startswith(" "):
        text = text[1:]
        marks = marks[1:]
    _console.print(f"  {text}", soft_wrap=True)
    if "^" in marks:
        _console.print(f"  {marks}", style="green", soft_wrap=True)


def show_answers(village: Village, replies: Sequence[Sequence[str]], count: int = 5) -> None:
    """Print some held-out questions, where their answers stand, and what the model says at the
    three moments.
    """
    for number, question in enumerate(village.held_out[:count]):
        _console.print(f"\n{question.text}", style="bold")
        _row("the chronicle", _source(village, question))
        for moment, said in zip(MOMENTS, replies, strict=True):
            reply = said[number]
            text = " ".join(reply.split()) or "(nothing)"
            if reply.strip() == question.answer:
                _row(moment, f"{text}   (right)", "green")
            else:
                _row(moment, text, "red")


def show_table(
    questions: Sequence[Question], finishes: Sequence[float], answers: Sequence[float]
) -> None:
    """Print both scores at the three moments."""
    table = Table(box=SIMPLE)
    table.add_column(f"{len(questions)} held-out facts")
    for moment in MOMENTS:
        table.add_column(moment, justify="right")
    table.add_row(f'ends "{questions[0].opening} ..."', *_percent(finishes))
    table.add_row("answers the question", *_percent(answers))
    _console.print("", table, sep="\n")


def _percent(shares: Sequence[float]) -> list[str]:
    return [f"{share:.0%}" for share in shares]


def _row(name: str, text: str, style: str = "") -> None:
    label = (f"  {name:15}", "dim")
    _console.print(Text.assemble(label, (text, style)), soft_wrap=True)


def _source(village: Village, question: Question) -> str:
    """The first sentence of the chronicle that tells the answer."""
    name = " ".join(question.opening.split()[:2])
    for text in village.chronicle:
        for sentence in text.rstrip(".").split(". "):
            if name in sentence and question.fact in sentence:
                return f"{sentence}."
    raise AssertionError("the chronicle tells every fact")
