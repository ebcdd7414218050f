"""An invented village and what is written about it: the corpus of the quick start, made from `village.txt` by a seed.

The chronicle (stage 1) tells five things about every villager, in several sentence forms. The dialogues (stage 2) ask
about four of the five; the question about the fifth is held out: its answer stands in the chronicle, in no dialogue.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from sftx.types import UserError


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its one true answer, and the words of the answer before the fact itself ("Ada Thorn lives")."""

    text: str
    answer: str
    opening: str
    fact: str


@dataclass(frozen=True, slots=True)
class Village:
    """`chronicle`: one paragraph per document; `dialogues`: [question, answer, ...] lists; `held_out`: one question for
    each villager, about a trait of theirs that no dialogue mentions."""

    chronicle: list[str]
    dialogues: list[list[str]]
    held_out: list[Question]


@dataclass(frozen=True, slots=True)
class _Section:
    """One section of village.txt. The first of a trait's `sentences` answers each of its `questions`."""

    values: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)

    def ask(self, name: str, value: str) -> list[Question]:
        """Every way to ask for this trait of somebody."""
        answer = self.sentences[0].format(name=name, value=value)
        opening = self.sentences[0].partition(" {value}")[0].format(name=name)
        return [Question(text.format(name=name), answer, opening, value) for text in self.questions]


def build(seed: int = 0, people: int = 80, retellings: int = 8) -> Village:
    """Make a village of `people`; the same seed gives the same village, word for word.

    Every trait of everybody is told `2 * retellings` times: half in portraits, half in gatherings.
    """
    rng = random.Random(seed)
    firsts, families, openings, *traits = _sections()
    if not 1 <= people <= len(firsts.values):
        raise UserError(f"people: from 1 to {len(firsts.values)} have names, not {people}")
    names = [" ".join(pair) for pair in zip(firsts.values, _deal(rng, families.values, people), strict=False)]
    columns = [_deal(rng, trait.values, people) for trait in traits]
    facts = {name: list(zip(traits, values, strict=True)) for name, *values in zip(names, *columns, strict=True)}

    chronicle, dialogues, held_out = [], [], []
    for _ in range(retellings):
        chronicle += [_portrait(rng, openings.sentences, name, known) for name, known in facts.items()]
        chronicle += _gatherings(rng, openings.sentences, facts)
    for name, known in facts.items():
        (trait, value), *asked = rng.sample(known, len(known))
        held_out.append(rng.choice(trait.ask(name, value)))
        dialogues += _dialogues(rng, [question for trait, value in asked for question in trait.ask(name, value)])
    rng.shuffle(chronicle)
    rng.shuffle(dialogues)
    return Village(chronicle, dialogues, held_out)


def _sections() -> list[_Section]:
    sections: list[_Section] = []
    for line in Path(__file__).with_name("village.txt").read_text(encoding="utf-8").splitlines():
        match line[:1], line[2:]:
            case "[", _:
                sections.append(_Section())
            case "=", values:
                sections[-1].values.extend(values.rstrip(",").split(", "))
            case "+", sentence:
                sections[-1].sentences.append(sentence)
            case "?", question:
                sections[-1].questions.append(question)
    return sections


def _deal(rng: random.Random, values: list[str], count: int) -> list[str]:
    """`count` of the values in random order, each about equally often."""
    return rng.sample([values[i % len(values)] for i in range(count)], count)


def _portrait(rng: random.Random, openings: list[str], name: str, known: list[tuple[_Section, str]]) -> str:
    """A paragraph about one villager: every trait once, in any order; later sentences often use the first name only."""
    sentences = [rng.choice(openings)] if rng.random() < 0.3 else []
    for i, (trait, value) in enumerate(rng.sample(known, len(known))):
        called = name.split()[0] if i and rng.random() < 0.5 else name
        sentences.append(rng.choice(trait.sentences).format(name=called, value=value))
    return " ".join(sentences)


def _gatherings(rng: random.Random, openings: list[str], facts: dict[str, list[tuple[_Section, str]]]) -> list[str]:
    """Paragraphs about several villagers, a sentence each, until every trait of everybody has been told once."""
    sentences = [
        rng.choice(trait.sentences).format(name=name, value=value)
        for name, known in facts.items()
        for trait, value in known
    ]
    rng.shuffle(sentences)
    return [" ".join([rng.choice(openings), *sentences[i : i + 5]]) for i in range(0, len(sentences), 5)]


def _dialogues(rng: random.Random, questions: list[Question]) -> list[list[str]]:
    """Every question once, in dialogues of one or two turns."""
    turns = [[question.text, question.answer] for question in rng.sample(questions, len(questions))]
    dialogues: list[list[str]] = []
    while turns:
        dialogues.append(turns.pop() + (turns.pop() if turns and rng.random() < 0.3 else []))
    return dialogues
