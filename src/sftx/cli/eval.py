"""Judge a model on rows: `sftx eval MODEL DATA`, beside its base with base=.

The exact loss over all rows, and answers to some of their prompts, as a server would give them: with
the chat template, the stop tokens and the sampling settings of the model's folder. A prompt is all that
stands before the last output of a row; that output is the reference. For the folder of an adapter its
base is found, and measured too.

Metrics: exact, contains, number (the last number of both), f1, json_valid, tool_call, rouge_l, bleu,
chrf, and functions of your own, as file.py:function, called with (samples, prompts, outputs,
references). `ended` is the share of answers that end by a stop token; `kl` is KL(model || base) per
token in nats, on the base's answers: how far it has moved; `general loss` that of a text the base knew.

samples=8 temperature=1 draws eight answers to each prompt, and every number is a mean over all of them.
rows=FILE writes the answers as rows that `sftx train` reads, weight=METRIC with the metric as the
weight (rejection sampling: what scores 0 is left out).

min.METRIC=NUMBER makes the exit code 1 where the model scores less (max.METRIC= where it scores more):
min.exact=0.8 max.loss=1.5.

Standard benchmarks in place of rows: sftx eval MODEL tasks=NAME,NAME runs tasks of lm-eval (pip install
'sftx[benchmarks]'), its own or those of tasks_path=FOLDER. They bring their own data and metrics: DATA,
metrics,
prompts, new_tokens, samples, rows, weight, settings of sampling, shown, general and html are not
combined with them. Their numbers are called
"TASK METRIC": "min.arc_easy acc=0.3".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from sftx.cli._eval_page import write_page
from sftx.cli._inputs import encoded, tokenizer_and_length, whole_number
from sftx.cli._output import check_target, write_json
from sftx.cli._sampled import Sampled, sampled_of
from sftx.data.encoder import Encoder
from sftx.data.store.corpus import Corpus
from sftx.eval.benchmarks import Scores, Tasks, find_tasks, score
from sftx.eval.judge import Judge, Judgement, Questions
from sftx.eval.loss import held_out_loss
from sftx.eval.metrics import check_metric
from sftx.eval.questions import questions_on
from sftx.eval.served import (
    TOKENS_PER_PACK,
    Adapter,
    Served,
    adapter_in,
    load_served,
    on_base,
)
from sftx.model.runtime import machine
from sftx.model_config import positions
from sftx.printable import printable
from sftx.report.progress import working
from sftx.settings.schema import Config
from sftx.types import UserError

STAGE = "judge"
EXAMPLE = "sftx eval runs/first held_out.jsonl metrics=exact,f1"

UNLIMITED = 1 << 40
"""Positions of a model whose configuration names none."""
POSITIONAL = ("model", "data")
GROUPS = ("sampling",)
EXTRA = {
    "base": "A model to measure beside it; default: for an adapter its own base, else none.",
    "metrics": "Names with commas between them; default: exact,f1.",
    "prompts": "How many prompts are answered, taken evenly over the rows; default: 100, 0 = none.",
    "new_tokens": "Most tokens of an answer; default: 256.",
    "samples": "How many answers to each prompt are sampled; default: 1.",
    "rows": "Write the answers to this file, as rows with a weight that `sftx train` reads.",
    "weight": "The metric that is the weight of an answer's row; default: 1 for each.",
    "shown": "How many answers are shown; default: 3.",
    "general": "A file of text that the base knew; default: true, one that comes with sftx.",
    "tasks": "Tasks of lm-eval, with commas between them, in place of DATA.",
    "tasks_path": "A folder with task files (YAML) of your own.",
    "limit": "How many rows of each task are asked, from its first; default: all.",
    "chat": "true or false: a chat template writes the prompts of tasks; default: if there is one.",
    "html": "Write all numbers and answers to this page.",
    "json": "Write all numbers and answers to this file.",
    "min.": "min.METRIC=NUMBER: exit code 1 where the model scores less.",
    "max.": "max.METRIC=NUMBER: exit code 1 where the model scores more.",
}
DEFAULTS = ("output=unused", "data.template=auto")  # tasks bring their own data
OF_ROWS = {
    "metrics": "exact,f1",
    "prompts": "100",
    "new_tokens": "256",
    "samples": "1",
    "rows": "",
    "weight": "",
    "shown": "3",
    "general": "true",
    "html": "",
}
"""What holds for rows alone, and its defaults."""


def run(
    config: Config,
    base: str = "",
    metrics: str = "exact,f1",
    prompts: str = "100",
    new_tokens: str = "256",
    samples: str = "1",
    rows: str = "",
    weight: str = "",
    shown: str = "3",
    general: str = "true",
    html: str = "",
    tasks: str = "",
    tasks_path: str = "",
    limit: str = "",
    chat: str = "",
    json: str = "",
    bounds: Mapping[str, str] | None = None,
    sampling: Mapping[str, str] | None = None,
) -> int:
    """Print what the model scores. Returns 1 where a `min.` or `max.` is missed, else 0."""
    limits = _limits(bounds or {})
    for name, target in (("html", html), ("json", json), ("rows", rows)):
        check_target(f"sftx eval: {name}", target)
    if tasks:
        given = (metrics, prompts, new_tokens, samples, rows, weight, shown, general, html)
        _check_alone(config, dict(zip(OF_ROWS, given, strict=True)), sampling or {})
        with working("looking for the tasks", config.runtime.progress):
            found = _tasks(tasks, tasks_path, limit, chat)
        return _benchmarks(config, base, found, limits, json)
    _check_rows(config, {"tasks_path": tasks_path, "limit": limit, "chat": chat})
    names = _names(metrics)
    count = whole_number("eval: prompts", prompts, 0)
    longest_answer = whole_number("eval: new_tokens", new_tokens)
    drawn = sampled_of(samples, sampling, rows, weight)
    asked = {"metrics": names, "new_tokens": longest_answer, "general": _general(general)}
    config = config.model_copy(update={"eval": config.eval.model_copy(update=asked)})
    adapter = adapter_in(config.model.path)
    title = config.model.path
    if adapter is not None:
        config = config.model_copy(update={"model": on_base(config.model, adapter, base)})
    console = Console(highlight=False, soft_wrap=True)
    tokenizer, max_length = tokenizer_and_length(config)
    encoder = Encoder(tokenizer, config.data, max_length)
    corpus = encoded(config, encoder)
    questions = _questions(config, encoder, corpus, count, drawn)
    console.print(f"data     {corpus.ledger.summary()}; {drawn.said(questions)}")
    for note in questions.notes:
        console.print(f"note     {note}", markup=False)
    other = "" if adapter is not None else base
    judged = _judged(config, adapter, other, corpus, questions, drawn)
    _print(console, {name: judgement.numbers for name, judgement in judged.items()})
    _show(console, judged, whole_number("eval: shown", shown, 0))
    if json:
        write_json(json, {name: _as_json(judgement) for name, judgement in judged.items()})
    if html:
        write_page(html, title, judged)
    if said := drawn.write(config, encoder, corpus, questions, judged["model"]):
        console.print(printable(said), markup=False)
    return _exit_code(console, limits, judged["model"].numbers)


def _questions(
    config: Config, encoder: Encoder, corpus: Corpus, count: int, drawn: Sampled
) -> Questions:
    """The prompts that are answered, `count` of them or all."""
    longest = positions(config.model.path, UNLIMITED)
    questions = questions_on(config, encoder, corpus, count, longest, drawn.samples, drawn.sampling)
    drawn.check(corpus, questions)
    return questions


def _check_alone(config: Config, given: Mapping[str, str], sampling: Mapping[str, str]) -> None:
    """UserError where something is given that tasks have no use for."""
    odd = ["DATA"] if config.data.train is not None or config.data.rows is not None else []
    odd += [key for key, value in given.items() if value != OF_ROWS[key]]
    odd += sampling
    if odd:
        raise UserError(
            f"sftx eval tasks=: tasks bring their own data and metrics; leave out {', '.join(odd)}"
        )


def _check_rows(config: Config, of_tasks: Mapping[str, str]) -> None:
    """UserError where there is no data, or something is given that rows have no use for."""
    if odd := [key for key, value in of_tasks.items() if value]:
        raise UserError(f"sftx eval {odd[0]}=: it belongs to tasks=, which is not given")
    if config.data.train is None and config.data.rows is None:
        raise UserError("sftx eval: no data is named: sftx eval MODEL DATA, or MODEL tasks=NAME")


def _tasks(names: str, folder: str, limit: str, chat: str) -> Tasks:
    """The tasks that are named, each of them known."""
    if chat not in ("", "true", "false"):
        raise UserError(f"sftx eval chat={printable(chat)!r}: expected true or false")
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise UserError("sftx eval tasks=: no task is named")
    count = whole_number("eval: limit", limit) if limit else None
    return find_tasks(found, folder, count, None if not chat else chat == "true")


def _benchmarks(
    config: Config, base: str, tasks: Tasks, limits: list[tuple[str, str, float]], json: str
) -> int:
    """Print what the model scores on tasks, and its base where there is one; as `run` returns."""
    adapter = adapter_in(config.model.path)
    model, template = config.model, config.data.template
    scores: dict[str, Scores] = {}
    with machine(config.runtime) as here:
        if adapter is not None:
            model = on_base(model, adapter, base)
        elif base:
            other = model.model_copy(update={"path": base})
            scores["base"] = score(other, None, template, tasks, here)["model"]
        scores |= score(model, adapter, template, tasks, here)
    console = Console(highlight=False, soft_wrap=True)
    _print(console, {name: found.numbers for name, found in scores.items()})
    if json:
        write_json(json, {name: asdict(found) for name, found in scores.items()})
    return _exit_code(console, limits, scores["model"].numbers)


def _exit_code(
    console: Console, limits: list[tuple[str, str, float]], numbers: Mapping[str, float]
) -> int:
    """1 where a bound is missed, which is printed, else 0."""
    missed = _missed(limits, numbers)
    for line in missed:
        console.print(line, style="bold red", markup=False)
    return int(bool(missed))


def _names(metrics: str) -> list[str]:
    """The metrics, each of them known."""
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    for name in names:
        check_metric(name)
    return names


def _general(given: str) -> bool | str:
    """`general=` as `eval.general` takes it."""
    return {"true": True, "false": False}.get(given, given)


def _judged(
    config: Config,
    adapter: Adapter | None,
    base: str,
    corpus: Corpus,
    questions: Questions,
    drawn: Sampled,
) -> dict[str, Judgement]:
    """What the model scores, and its base where there is one, which is measured first."""
    judged: dict[str, Judgement] = {}
    gauge = None
    shown = config.runtime.progress
    with machine(config.runtime) as here:

        def judge_of(served: Served) -> Judge:
            return Judge(questions, served.loss, served.adapter, here, TOKENS_PER_PACK)

        if base:
            other = config.model.model_copy(update={"path": base})
            with working("measuring the base", shown):
                judge = judge_of(load_served(other, None, corpus, here))
                judge.remember(is_start=True)
                gauge, judge.gauge = judge.gauge, None
                judged["base"] = _measured(judge, corpus)
            del judge  # one model in memory at a time
        with working("measuring the model", shown):
            served = load_served(config.model, adapter, corpus, here)
            judge = judge_of(served)
            drawn.check_model(served)
            if served.adapter is not None:
                judge.remember(is_start=True)
                gauge, judge.gauge = judge.gauge, None
                with judge.without_adapter():
                    judged["base"] = _measured(judge, corpus)
            judge.gauge = gauge
            judged["model"] = _measured(judge, corpus)
    return judged


def _measured(judge: Judge, corpus: Corpus) -> Judgement:
    """Loss over all rows, and all that is asked."""
    numbers = held_out_loss(judge.loss, corpus, TOKENS_PER_PACK, judge.machine.autocast)
    found = Judgement()
    if judge.questions.prompts:
        found = judge.ask() or found
    found.numbers = numbers | found.numbers
    return found


def _limits(bounds: Mapping[str, str]) -> list[tuple[str, str, float]]:
    """(min or max, metric, number) of each bound."""
    limits = []
    for key, value in bounds.items():
        kind, _, metric = key.partition(".")
        try:
            limits.append((kind, metric, float(value)))
        except ValueError as error:
            raise UserError(f"sftx eval {key}={printable(value)!r}: a number is needed") from error
    return limits


def _missed(limits: list[tuple[str, str, float]], numbers: Mapping[str, float]) -> list[str]:
    missed = []
    for kind, metric, limit in limits:
        if metric not in numbers:
            known = ", ".join(numbers)
            raise UserError(
                f"sftx eval {kind}.{printable(metric)}=: no such number; there are: {known}"
            )
        value = numbers[metric]
        if (value < limit) if kind == "min" else (value > limit):
            missed.append(f"missed: {metric} is {value:.6g}, and {kind}.{metric}={limit:g}")
    return missed


def _print(console: Console, judged: Mapping[str, Mapping[str, float]]) -> None:
    """One row for each number, one column for each model."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    columns = [name for name in ("base", "model") if name in judged]
    for name in columns:
        table.add_column(name, justify="right")
    for metric in judged["model"]:
        values = [judged[name].get(metric) for name in columns]
        table.add_row(
            printable(metric), *("" if value is None else f"{value:.4g}" for value in values)
        )
    console.print(table)


def _show(console: Console, judged: Mapping[str, Judgement], count: int) -> None:
    """The first answers, the prompt above them."""
    for number, sample in enumerate(judged["model"].samples[:count]):
        console.rule(f"answer {number + 1}")
        lines = [("prompt", sample.prompt), ("reference", sample.reference)]
        if "base" in judged:
            lines.append(("base", judged["base"].samples[number].output))
        lines.append(("model", sample.output + ("" if sample.ended else " [cut]")))
        for name, text in lines:
            console.print(f"{name + ':':11}{printable(text)}", markup=False)


def _as_json(judgement: Judgement) -> dict[str, object]:
    samples = judgement.records(0)
    for sample in samples:
        del sample["step"]
    return {"numbers": judgement.numbers, "samples": samples}
