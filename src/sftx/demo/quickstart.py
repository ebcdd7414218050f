"""The quick start: make a village, train a new model on its chronicle, then on dialogues, and ask
it new questions.

It uses what every user of sftx uses: YAML files, `sftx.steps`, and the Hugging Face folders that
come out.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from math import exp
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from sftx.data.tokenizer import Tokenizer
from sftx.demo.printing import show, show_answers, show_table, show_targets, tell
from sftx.demo.tiny_model import make_model
from sftx.demo.village import Question, Village, build
from sftx.model.runtime import machine
from sftx.settings.load import load_config
from sftx.training.loop import steps
from sftx.types import UserError

MARK = "chronicle.txt"  # a folder that holds this file is an earlier quick start
LEAD = "It was market day in Tarnwick."  # stands before the sentence that the model is to end
STAGES = (
    """\
# Plain text: every token is a target.
model: {folder}/untrained
data: {{train: {folder}/stage1.jsonl, cache: {folder}/cache}}
output: {folder}/stage1
batch: {{examples_per_step: 16, epochs: {epochs}}}
optim: {{learning_rate: 3.0e-3}}
runtime: {{device: cpu, threads: 1}}  # so small a model gains little from more
""",
    """\
# Dialogues: the answers are targets. The model to start from is the one that stage 1 made.
model: {folder}/stage1
data: {{train: {folder}/stage2.jsonl, eval: {folder}/held_out.jsonl, cache: {folder}/cache}}
output: {folder}/stage2
batch: {{examples_per_step: 16, epochs: {epochs}}}
optim: {{learning_rate: 5.0e-4}}
runtime: {{device: cpu, threads: 1}}
""",
)


class Size(NamedTuple):
    """How much there is to learn and how long to train; `epochs` of stage 1 and of stage 2."""

    people: int = 80
    retellings: int = 8
    hidden: int = 128
    layers: int = 2
    epochs: tuple[int, int] = (6, 4)


def run(folder: str = "runs/demo", seed: int = 0, size: Size | None = None) -> None:
    """Run the quick start in `folder`, replacing an earlier one there, and print it for a newcomer.

    The last line printed gives the shares of held-out questions that are answered word for word
    before any training and after both stages, and the seconds of both trainings. Raises UserError
    where `folder` holds something else.
    """
    disable_progress_bar()
    size = size or Size()
    home = _fresh(Path(folder))
    village = build(seed, size.people, size.retellings)
    _write(village, home, size)
    texts = [*village.chronicle, *(text for dialogue in village.dialogues for text in dialogue)]
    parameters = make_model(home / "untrained", texts, seed, size.hidden, size.layers)
    tokenizer = Tokenizer.load(str(home / "untrained"))
    paragraphs = len(village.chronicle)
    dialogues = len(village.dialogues)
    tell(
        "opening",
        parameters=parameters,
        paragraphs=paragraphs,
        people=size.people,
        dialogues=dialogues,
    )

    tell("stage1")
    show_targets({"text": village.chronicle[0]}, tokenizer)
    show("\n\n".join(village.chronicle[1:3]))
    seconds = _train(home / "stage1.yaml")

    tell("stage2")
    show_targets(max(village.dialogues, key=len), tokenizer)
    seconds += _train(home / "stage2.yaml")

    models = (home / "untrained", home / "stage1", home / "stage2")
    with machine(load_config(str(home / "stage2.yaml")).runtime):
        finishes, answers, replies = zip(
            *(_ask(model, village.held_out) for model in models), strict=True
        )
    tell("answers")
    show_answers(village, replies)
    show_table(village.held_out, finishes, answers)
    tell("lesson")
    tell("closing", folder=home)
    print(
        f"held_out_exact_match before={answers[0]:.2f} after={answers[2]:.2f} seconds={seconds:.0f}"
    )


def _train(settings: Path) -> float:
    """Run the stage that a YAML file describes; returns its seconds, start-up included."""
    began = time.perf_counter()
    losses = [
        record.loss for record in steps(load_config(str(settings))) if record.loss is not None
    ]
    seconds = time.perf_counter() - began
    first = losses[0]
    last = sum(losses[-10:]) / len(losses[-10:])
    tell(
        "losses",
        steps=len(losses),
        seconds=seconds,
        first=first,
        last=last,
        before=exp(-first),
        after=exp(-last),
    )
    return seconds


def _ask(folder: Path, questions: list[Question]) -> tuple[float, float, list[str]]:
    """Load a trained folder as any program would; the share of sentences ended, of questions
    answered, the answers.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [[{"role": "user", "content": question.text}] for question in questions]
    prompts = [
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        for turn in turns
    ]
    replies = _continued(model, tokenizer, prompts)
    endings = _continued(model, tokenizer, [f"{LEAD} {question.opening}" for question in questions])
    ended = [
        (q.opening + ending).startswith(q.answer)
        for q, ending in zip(questions, endings, strict=True)
    ]
    answered = [reply.strip() == q.answer for q, reply in zip(questions, replies, strict=True)]
    return sum(ended) / len(questions), sum(answered) / len(questions), replies


def _continued(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """What the model adds to each prompt, greedily, until it stops as it was trained to."""
    batch = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    out = model.generate(**batch, do_sample=False, max_new_tokens=24)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _fresh(folder: Path) -> Path:
    """Empty the folder of what an earlier quick start left; refuse one with anything else."""
    if folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists()
    ):
        raise UserError(
            f"{folder}: holds something that is not a quick start; choose another folder"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _write(village: Village, folder: Path, size: Size) -> None:
    """The corpus as files that `sftx train` reads, the settings of both stages, and the chronicle
    to read.
    """

    def write(name: str, lines: Iterable[str]) -> None:
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    write(MARK, ["\n\n".join(village.chronicle)])
    write("stage1.jsonl", (json.dumps({"text": text}) for text in village.chronicle))
    write("stage2.jsonl", map(json.dumps, village.dialogues))
    write(
        "held_out.jsonl",
        (json.dumps([question.text, question.answer]) for question in village.held_out),
    )
    for number, settings, epochs in zip((1, 2), STAGES, size.epochs, strict=True):
        write(
            f"stage{number}.yaml",
            settings.format(folder=folder.as_posix(), epochs=epochs).splitlines(),
        )
