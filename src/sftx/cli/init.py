"""Write a first run.yaml for a model, data and a goal: `sftx init model=... data=... goal=instruct`.

What is not named is asked for. sftx reads all rows, says what it saw (their format, tokens, which
turns of the first row carry weight), and chooses lengths, batch, method, precision and evaluation by
them and by what fits into this machine's memory. Each setting stands in the file with its reason;
`sftx train run.yaml` runs it as it is. A JSON schema is written beside it, by which editors complete
and check the file. Nothing is overwritten.

Goals: instruct (answer and follow instructions, from dialogues), domain (the language and facts of a
field, mostly from plain text), style (a voice or a format, from few examples), reasoning (think
before answering, from dialogues with thoughts).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from sftx.data.sources.read import find_files, is_hub_name
from sftx.model.folder import load_config
from sftx.printable import printable
from sftx.report.progress import duration
from sftx.settings.load import load_config as load_settings
from sftx.settings.schema import Model
from sftx.starter.choose import GOALS, Choice, Goal, choose
from sftx.starter.look import Seen, look
from sftx.starter.text import SCHEMA, as_yaml, check_schema, write_schema
from sftx.types import UserError

STAGE = "begin"
EXAMPLE = "sftx init model=HuggingFaceTB/SmolLM2-135M-Instruct data=chats.jsonl goal=instruct"
EXTRA = {
    "model": "A Hugging Face folder, or the name of a model on the hub.",
    "data": "A file, glob or folder of rows.",
    "goal": "instruct, domain, style or reasoning.",
    "to": "The file to write; default: run.yaml.",
    "output": "The folder of the run; default: runs/ and the name of the data.",
}
TRIES = 3
SHOWN = 60  # characters of a turn


def run(
    model: str = "", data: str = "", goal: str = "", to: str = "run.yaml", output: str = ""
) -> int:
    """Look, choose, write. Returns 0."""
    target = _free_file(to)
    if goal:
        _goal(goal)
    model = model or _asked("model", "Which model? A folder, or a name on the hub", _check_model)
    _check_model(model)
    data = data or _asked("data", "Which data? A file, a glob or a folder of rows", _check_data)
    _check_data(data)
    console = Console(highlight=False, soft_wrap=True)
    with console.status("reading the rows") as status:
        seen = look(
            model, data, lambda done, total: status.update(f"encoding {done:,} of {total:,} rows")
        )
    _say_what_was_seen(console, seen)
    goal = goal or _asked("goal", _question(seen), _goal_or_default(seen)) or _likely(seen)
    chosen = _goal(goal)
    for note in _doubts(seen, chosen):
        console.print(f"note     {note}", markup=False)
    output = output or _free_folder(data, chosen)
    with console.status("looking for what fits into this machine"):
        choice = choose(seen, chosen, output)
    _write(target, choice, chosen)
    _say_what_comes_next(console, to, choice)
    return 0


def _free_file(name: str) -> Path:
    """The file to write; UserError where it is no YAML, or is there."""
    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"sftx init: to={name}: the name of a file that ends in .yaml is needed")
    if file.exists():
        raise UserError(
            f"sftx init: {name} is there and is not overwritten; choose another with to="
        )
    check_schema(file.parent)
    return file


def _say_what_comes_next(console: Console, name: str, choice: Choice) -> None:
    console.print(f"written  {printable(name)}, and {SCHEMA} beside it for your editor")
    about = f", about {duration(choice.seconds)}" if choice.seconds else ""
    name = printable(name)
    console.print(f"next     sftx inspect {name} row=1   the tokens of a row, as they are trained")
    console.print(f"         sftx train {name}           {choice.steps:,} steps{about}")


def _asked(key: str, question: str, check: Callable[[str], object]) -> str:
    """The answer on the terminal; UserError where there is none, or none that can be used."""
    if not sys.stdin.isatty():
        raise UserError(
            f"sftx init: {key}= is missing, and there is no terminal to ask on: {EXTRA[key]} "
            f"For example: {EXAMPLE}"
        )
    for _ in range(TRIES):
        try:
            answer = input(f"{question}: ").strip()
            check(answer)
        except EOFError:
            break
        except UserError as error:
            print(f"         {error}")
        else:
            return answer
    raise UserError(f"sftx init: no {key} was named; nothing is written")


def _check_model(model: str) -> None:
    if not model:
        raise UserError("a model is needed: a folder with config.json, or a name on the hub")
    load_config(Model(path=model))


def _check_data(data: str) -> None:
    if not data:
        raise UserError("data is needed: a file such as chats.jsonl, a glob, or a folder")
    if not is_hub_name(data):
        find_files(data)


def _goal(text: str) -> Goal:
    for goal in GOALS:
        if text == goal:
            return goal
    known = "; ".join(f"{name}: {meaning}" for name, meaning in GOALS.items())
    raise UserError(f"sftx init: goal={text!r}; known are {known}")


def _goal_or_default(seen: Seen) -> Callable[[str], object]:
    return lambda text: _goal(text or _likely(seen))


def _question(seen: Seen) -> str:
    lines = [f"  {name:10} {meaning}" for name, meaning in GOALS.items()]
    return "\n".join(["What shall it learn?", *lines, f"Goal [{_likely(seen)}]"])


def _likely(seen: Seen) -> Goal:
    """The goal that the rows suggest."""
    if seen.form == "text":
        return "domain"
    return "reasoning" if seen.has_thoughts else "instruct"


def _doubts(seen: Seen, goal: Goal) -> list[str]:
    """Where goal, data and model do not seem to fit."""
    if seen.form == "text" and goal != "domain":
        return [
            f"the rows are plain text: no turn in them is an answer; goal=domain fits, not {goal}"
        ]
    if goal == "reasoning" and not seen.has_thoughts:
        return ["the first row holds no thought (reasoning_content); goal=instruct fits such rows"]
    return []


def _say_what_was_seen(console: Console, seen: Seen) -> None:
    ledger = seen.corpus.ledger
    template = "with a chat template" if seen.has_template else "without a chat template"
    console.print(
        printable(f"model    {seen.config.model.path}: {seen.positions:,} positions, {template}"),
        markup=False,
    )
    share = 100 * ledger.targets / max(ledger.tokens, 1)
    console.print(
        printable(
            f"data     {seen.config.data.train}: {ledger.read:,} rows ({seen.form}), "
            f"{ledger.tokens:,} tokens, {share:.0f} % of them targets, the longest example "
            f"{seen.longest:,}"
        ),
        markup=False,
    )
    for name, (value, reason) in seen.needed.items():
        console.print(printable(f"needs    data.{name}: {value} ({reason})"), markup=False)
    for number, turn in enumerate(seen.first[:8]):
        text = " ".join(turn.text.split())
        text = text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."
        weight = "context" if not turn.weight else "trained"
        weight += f", weight {turn.weight:g}" if turn.weight not in (0, 1) else ""
        first = "row 1" if number == 0 else ""
        console.print(printable(f"{first:9}{turn.role:10} {weight:8} {text}"), markup=False)
    if len(seen.first) > 8:
        console.print(f"         and {len(seen.first) - 8} more turns")


def _free_folder(data: str, goal: Goal) -> str:
    """A folder for the run that is not there yet."""
    stem = Path(data.rstrip("/*")).name.partition(".")[0] or "run"
    name = f"runs/{stem}-{goal}"
    number = 2
    while Path(name).exists():
        name = f"runs/{stem}-{goal}-{number}"
        number += 1
    return name


def _write(target: Path, choice: Choice, goal: Goal) -> None:
    about = f", about {duration(choice.seconds)} on this machine" if choice.seconds else ""
    head = [
        f"Made by sftx init; goal: {goal} ({GOALS[goal]}).",
        f"{choice.parameters:,} parameters, {choice.steps:,} steps{about}; {choice.memory}.",
        "Every setting: sftx train --help. What it will take: sftx plan " + target.name,
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_schema(target.parent)
    text = as_yaml(choice.settings, head)
    with target.open("x", encoding="utf-8") as file:
        file.write(text)
    load_settings(str(target))  # it must be one that sftx takes
