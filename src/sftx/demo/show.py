"""What the quick start prints: the two stages, for somebody who has never fine-tuned a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sftx.data.encode import encode
from sftx.data.tokenizer import Tokenizer
from sftx.demo.village import Question, Village

MOMENTS = ("untrained", "after stage 1", "after stage 2")


class Page:
    """Prints to stdout, wrapped at words; colours on a terminal only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.console = Console(highlight=False, markup=False)
        self.width = min(self.console.width, 100)

    def say(self, text: str = "", style: str = "") -> None:
        """A paragraph."""
        self.console.print(text, style=style, width=self.width)

    def heading(self, text: str) -> None:
        """The title of a part."""
        self.say(f"\n{text}\n{'=' * len(text)}", "bold cyan")

    def opening(self, village: Village, parameters: int) -> None:
        """What there is before training."""
        self.heading("sftx quick start: one small model, two stages of fine-tuning")
        self.say(
            f"The model is newborn: {parameters:,} random numbers. All it will ever read was made just now: the chronicle "
            f"of an invented village ({len(village.chronicle):,} paragraphs; they tell five things about each of "
            f"{len(village.held_out)} villagers) and {len(village.dialogues):,} dialogues, which ask about four of the "
            "five. Questions about the fifth are held out. Will the model be able to answer them?"
        )

    def stage_1(self, village: Village) -> None:
        """The idea of stage 1, and three of its paragraphs."""
        self.heading("Stage 1, plain text: WHAT is true")
        self.say("The model reads the chronicle. It learns to predict every token marked ^ from those before it.\n")
        self._marked({"text": village.chronicle[0]})
        for text in village.chronicle[1:3]:
            self.say(f"\n{text}")

    def stage_2(self, village: Village) -> None:
        """The idea of stage 2, and a dialogue of two turns."""
        self.heading("Stage 2, dialogues: HOW to answer")
        self.say(
            "The same model reads dialogues and learns to predict the answers only, up to <|end|>, which tells it "
            "to stop. The questions are read, but not learned.\n"
        )
        self._marked(max(village.dialogues, key=len))

    def losses(self, losses: Sequence[float], seconds: float) -> None:
        """The loss of the first step and of the last ten, in words."""
        first, last = losses[0], sum(losses[-10:]) / len(losses[-10:])
        self.say(
            f"\n{len(losses):,} steps in {seconds:.0f} seconds: loss {first:.2f} -> {last:.2f}. On average the model gave "
            f"the right token a chance of 1 in {math.exp(first):,.0f} at first, and of 1 in {math.exp(last):,.1f} at the end."
        )

    def answers(self, village: Village, replies: Sequence[Sequence[str]], count: int = 5) -> None:
        """Some held-out questions, where the answer stands, and what the model says at the three moments."""
        self.heading("Held-out questions: the answers stand in the chronicle and in no dialogue")
        for i, question in enumerate(village.held_out[:count]):
            self.say(f"\n{question.text}", "bold")
            self._row("chronicle", _source(village, question))
            for moment, answers in zip(MOMENTS, replies, strict=True):
                right = answers[i].strip() == question.answer
                self._row(moment, " ".join(answers[i].split()) + "   (right)" * right, "green" if right else "red")

    def table(self, question: Question, count: int, finishes: Sequence[float], answers: Sequence[float]) -> None:
        """Both scores at the three moments."""
        table = Table(box=SIMPLE)
        for column in (f"{count} held-out facts", *MOMENTS):
            table.add_column(column, justify="right" if column in MOMENTS else "left")
        table.add_row(f'ends the sentence "{question.opening} ..."', *(f"{share:.0%}" for share in finishes))
        table.add_row("answers the question, word for word", *(f"{share:.0%}" for share in answers))
        self.console.print()
        self.console.print(table)
        self.say(
            "Stage 1 gave the model its knowledge, but all it could do was to go on writing the chronicle. Stage 2 taught "
            "it to answer and to stop; the facts asked for here it kept from stage 1."
        )

    def closing(self) -> None:
        """Where everything is, and how to go on by hand."""
        self.heading(f"What is in {self.folder}")
        self._row("chronicle.txt", "the chronicle, to read; stage1.jsonl holds the same, one paragraph a row")
        self._row("stage2.jsonl", "the dialogues; held_out.jsonl: the questions that are not among them")
        self._row("stage1/ stage2/", "the trained models, as Hugging Face folders, with the record of each run")
        self.say("\nEach stage is one command. Repeat them, then change a setting or the data:")
        for stage in ("stage1", "stage2"):
            self._row("", f"sftx train {self.folder}/{stage}.yaml output={self.folder}/my-{stage}", left=0)
        self.say()

    def _row(self, name: str, text: str, style: str = "", left: int = 17) -> None:
        self.console.print(Text(f"  {name:{left}}", "dim") + Text(text, style), soft_wrap=True)

    def _marked(self, row: object) -> None:
        """A row as the model sees it, with ^ under every token that is a target, as `sftx.encode` says."""
        tokenizer = Tokenizer.load(str(self.folder / "untrained"))
        for example in encode(row, tokenizer):
            text = marks = ""
            for token, weight in zip(example.ids, example.weights, strict=True):
                piece = tokenizer.decode([token])
                text, marks = text + piece, marks + ("^" if weight else " ") * len(piece)
                if piece == "<|end|>" or (len(text) > self.width - 20 and piece[-1] in ".,"):
                    self.console.print(f"  {text}\n  [green]{marks.rstrip()}[/]", markup=True, soft_wrap=True)
                    text = marks = ""


def _source(village: Village, question: Question) -> str:
    """The first sentence of the chronicle that tells the answer."""
    name = " ".join(question.opening.split()[:2])
    sentences = (sentence for text in village.chronicle for sentence in text.rstrip(".").split(". "))
    return next(f"{sentence}." for sentence in sentences if name in sentence and question.fact in sentence)
