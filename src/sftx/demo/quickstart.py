"""The quick start: make a village, train a new model on its chronicle, then on dialogues, and ask it new questions.

It uses what every user of sftx uses: YAML files, `sftx.steps`, and the Hugging Face folders that come out.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from sftx.demo.newborn import make_model
from sftx.demo.show import Page
from sftx.demo.village import Question, Village, build
from sftx.eval.generate import generate
from sftx.settings import load_config
from sftx.training.loop import steps
from sftx.types import UserError

MODELS = ("untrained", "stage1", "stage2")
MARK = "chronicle.txt"  # a folder that holds this file is an earlier quick start
STAGE_1 = """\
# Stage 1, plain text: every token is a target.
model: {folder}/untrained
data: {{train: {folder}/stage1.jsonl, cache: {folder}/cache}}
output: {folder}/stage1
batch: {{examples_per_step: 16, epochs: {epochs}}}
optim: {{learning_rate: 3.0e-3}}
runtime: {{device: cpu, threads: 2}}
"""
STAGE_2 = """\
# Stage 2, dialogues: the answers are targets. It starts from the model that stage 1 made.
model: {folder}/stage1
data: {{train: {folder}/stage2.jsonl, eval: {folder}/held_out.jsonl, cache: {folder}/cache}}
output: {folder}/stage2
batch: {{examples_per_step: 16, epochs: {epochs}}}
optim: {{learning_rate: 5.0e-4}}
runtime: {{device: cpu, threads: 2}}
"""


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is to learn, and how much is spent on it; `epochs` of stage 1 and of stage 2."""

    people: int = 80
    retellings: int = 8
    hidden: int = 128
    layers: int = 2
    epochs: tuple[int, int] = (6, 2)


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares of 1 over the held-out facts, for the untrained model, after stage 1 and after stage 2.

    `finishes`: the model ends a sentence as the chronicle does; `answers`: it answers the question, word for word.
    `seconds`: wall time of both trainings, start-up included.
    """

    finishes: tuple[float, float, float]
    answers: tuple[float, float, float]
    seconds: float


def run(folder: str = "runs/demo", seed: int = 0, size: Size | None = None) -> Scores:
    """Run the quick start in `folder`, replacing an earlier one there, and print it for a newcomer.

    Raises UserError where `folder` holds something else.
    """
    disable_progress_bar()
    size, home = size or Size(), _fresh(Path(folder))
    village = build(seed, size.people, size.retellings)
    _write(village, home, size)
    texts = [*village.chronicle, *(text for dialogue in village.dialogues for text in dialogue)]
    parameters = make_model(home / "untrained", texts, seed, size.hidden, size.layers)

    page = Page(home)
    page.opening(village, parameters)
    page.stage_1(village)
    seconds = _train(home / "stage1.yaml", page)
    page.stage_2(village)
    seconds += _train(home / "stage2.yaml", page)

    finishes, answers, replies = zip(*(_ask(home / name, village.held_out) for name in MODELS), strict=True)
    page.answers(village, replies)
    page.table(village.held_out[0], len(village.held_out), finishes, answers)
    page.closing()
    print(f"held_out_exact_match before={answers[0]:.2f} after={answers[2]:.2f} seconds={seconds:.0f}")
    return Scores(finishes, answers, seconds)


def _train(settings: Path, page: Page) -> float:
    """Run the stage that a YAML file describes; returns its seconds."""
    began = time.perf_counter()
    losses = [record.loss for record in steps(load_config(str(settings))) if record.loss is not None]
    seconds = time.perf_counter() - began
    page.losses(losses, seconds)
    return seconds


def _ask(folder: Path, questions: list[Question]) -> tuple[float, float, list[str]]:
    """Load a trained folder as any program would; the share of sentences ended, of questions answered, the answers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turns = [[{"role": "user", "content": question.text}] for question in questions]
    prompts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    replies = generate(model, tokenizer, prompts, max_new_tokens=24)
    endings = generate(model, tokenizer, [question.opening for question in questions], max_new_tokens=24)
    ended = [(q.opening + ending).startswith(q.answer) for q, ending in zip(questions, endings, strict=True)]
    answered = [reply.strip() == q.answer for q, reply in zip(questions, replies, strict=True)]
    return sum(ended) / len(questions), sum(answered) / len(questions), replies


def _fresh(folder: Path) -> Path:
    """An empty folder: what an earlier quick start left there is removed, anything else is refused."""
    if folder.exists() and not (folder / MARK).exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: holds something that is not a quick start; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _write(village: Village, folder: Path, size: Size) -> None:
    """The corpus as files that `sftx train` reads, the settings of both stages, and the chronicle to read."""

    def write(name: str, lines: Iterable[str]) -> None:
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    write(MARK, ["\n\n".join(village.chronicle)])
    write("stage1.jsonl", (json.dumps({"text": text}) for text in village.chronicle))
    write("stage2.jsonl", map(json.dumps, village.dialogues))
    write("held_out.jsonl", (json.dumps([question.text, question.answer]) for question in village.held_out))
    for name, settings, epochs in zip(("stage1", "stage2"), (STAGE_1, STAGE_2), size.epochs, strict=True):
        write(f"{name}.yaml", [settings.format(folder=folder.as_posix(), epochs=epochs).rstrip()])
