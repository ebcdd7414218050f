"""An invented village and what is written about it: the corpus of the quick start, made from
`village.txt` by a seed.

The chronicle (stage 1) tells five things about every villager, in several sentence forms. The
dialogues (stage 2) ask about four of the five; the question about the fifth is held out: its answer
stands in the chronicle, in no dialogue.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from sftx.types import UserError


@dataclass(frozen=True, slots=True)
class Question:
    """`answer` is `opening`, `fact` and little more: "Ada Thorn keeps" "a young fox" "."."""

    text: str
    answer: str
    opening: str
    fact: str


@dataclass(frozen=True, slots=True)
class Village:
    """`chronicle`: paragraphs; `dialogues`: [question, answer, ...] lists; `held_out`: a question
    for each villager.
    """

    chronicle: list[str]
    dialogues: list[list[str]]
    held_out: list[Question]


@dataclass(frozen=True, slots=True)
class _Section:
    """A section of village.txt. The first of the `sentences` answers each of the `questions`."""

    values: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)

    def ask(self, name: str, value: str) -> list[Question]:
        """Every way to ask for this trait of somebody."""
        answer = self.sentences[0].format(name=name, value=value)
        opening, _, _ = answer.partition(f" {value}")
        questions: list[Question] = []
        for text in self.questions:
            questions.append(Question(text.format(name=name), answer, opening, value))
        return questions

    def deal(self, rng: random.Random, count: int) -> list[str]:
        """`count` values in random order, each about equally often."""
        values = [self.values[i % len(self.values)] for i in range(count)]
        return rng.sample(values, count)


_Fact = tuple[_Section, str]
"""A trait of a villager, and its value."""


def build(seed: int = 0, people: int = 80, retellings: int = 8) -> Village:
    """Make a village of `people`; the same seed gives the same village, word for word.

    Everything is told `2 * retellings` times: in portraits of one villager, and in gatherings, a
    sentence for each.
    """
    rng = random.Random(seed)
    firsts, families, openings, *traits = _sections()
    if not 1 <= people <= len(firsts.values):
        raise UserError(f"people: from 1 to {len(firsts.values)} have names, not {people}")
    facts: dict[str, list[_Fact]] = {}
    for first, family in zip(firsts.values, families.deal(rng, people), strict=False):
        facts[f"{first} {family}"] = []
    for trait in traits:
        values = trait.deal(rng, people)
        for known, value in zip(facts.values(), values, strict=True):
            known.append((trait, value))

    village = Village([], [], [])
    for _ in range(retellings):
        for name, known in facts.items():
            paragraph = _portrait(rng, name, known, openings.sentences)
            village.chronicle.append(paragraph)
        paragraphs = _gatherings(rng, facts, openings.sentences)
        village.chronicle.extend(paragraphs)
    for name, known in facts.items():
        in_random_order = rng.sample(known, len(known))
        trait, value = in_random_order.pop(0)
        ways_to_ask = trait.ask(name, value)
        village.held_out.append(rng.choice(ways_to_ask))
        village.dialogues.extend(_dialogues(rng, name, in_random_order))
    rng.shuffle(village.chronicle)
    rng.shuffle(village.dialogues)
    return village


def _tell(rng: random.Random, name: str, fact: _Fact) -> str:
    trait, value = fact
    sentence = rng.choice(trait.sentences)
    return sentence.format(name=name, value=value)


def _portrait(rng: random.Random, name: str, known: list[_Fact], openings: list[str]) -> str:
    """A paragraph on one villager; the first sentence on a fact has the full name."""
    sentences: list[str] = []
    if rng.random() < 0.3:
        sentences.append(rng.choice(openings))
    for i, fact in enumerate(rng.sample(known, len(known))):
        called = name
        if i > 0 and rng.random() < 0.5:
            called = name.split()[0]
        sentences.append(_tell(rng, called, fact))
    return " ".join(sentences)


def _gatherings(
    rng: random.Random, facts: dict[str, list[_Fact]], openings: list[str]
) -> list[str]:
    """Paragraphs of five sentences, on whomever chance brings together."""
    sentences: list[str] = []
    for name, known in facts.items():
        for fact in known:
            sentences.append(_tell(rng, name, fact))
    rng.shuffle(sentences)
    paragraphs: list[str] = []
    for i in range(0, len(sentences), 5):
        opening = rng.choice(openings)
        paragraph = [opening, *sentences[i : i + 5]]
        paragraphs.append(" ".join(paragraph))
    return paragraphs


def _dialogues(rng: random.Random, name: str, asked: list[_Fact]) -> list[list[str]]:
    """All ways to ask for these facts, in dialogues of one turn or two."""
    turns: list[list[str]] = []
    for trait, value in asked:
        for question in trait.ask(name, value):
            turns.append([question.text, question.answer])
    rng.shuffle(turns)
    dialogues: list[list[str]] = []
    while turns:
        dialogue = turns.pop()
        if turns and rng.random() < 0.3:
            dialogue = dialogue + turns.pop()
        dialogues.append(dialogue)
    return dialogues


def _sections() -> list[_Section]:
    sections: list[_Section] = []
    file = Path(__file__).with_name("village.txt")
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line[2:]
        match line[:1]:
            case "[":
                sections.append(_Section())
            case "=":
                sections[-1].values.extend(text.rstrip(",").split(", "))
            case "+":
                sections[-1].sentences.append(text)
            case "?":
                sections[-1].questions.append(text)
    return sections
