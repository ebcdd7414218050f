"""Judge a model on rows: `sftx eval MODEL DATA`, beside its base with base=.

The exact loss over all rows, and answers to some of their prompts, as a server would give them: with
the chat template, the stop tokens and the sampling settings of the model's folder. A prompt is all that
stands before the last output of a row; that output is the reference. For the folder of an adapter its
base is found, and measured too.

Metrics: exact, contains, number (the last number of both), f1, json_valid, tool_call, rouge_l, bleu,
chrf, and functions of your own, as file.py:function, called with (samples, prompts, outputs,
references). `ended` is the share of answers that end by a stop token; `kl` is KL(model || base) per
token in nats, on the model's answers: how far it has moved.

min.METRIC=NUMBER makes the exit code 1 where the model scores less (max.METRIC= where it scores more):
min.exact=0.8 max.loss=1.5.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from torch import Tensor

from sftx.cli._inputs import encoded, tokenizer_and_length, whole_number
from sftx.cli._output import write_json
from sftx.data.encoder import Encoder
from sftx.eval.judge import (
    Asked,
    Judgement,
    Served,
    base_of,
    distance,
    judge,
    load_served,
    prompts_of,
)
from sftx.eval.metrics import check_metric
from sftx.model.runtime import machine
from sftx.printable import printable
from sftx.settings.schema import Config, Model
from sftx.types import UserError

STAGE = "judge"
EXAMPLE = "sftx eval runs/first held_out.jsonl metrics=exact,f1"
POSITIONAL = ("model", "data")
EXTRA = {
    "base": "A model to measure beside it; default: for an adapter its own base, else none.",
    "metrics": "Names with commas between them; default: exact.",
    "prompts": "How many prompts are answered, taken evenly over the rows; default: 100, 0 = none.",
    "new_tokens": "Most tokens of an answer; default: 256.",
    "shown": "How many answers are shown; default: 3.",
    "json": "Write all numbers and answers to this file.",
    "min.": "min.METRIC=NUMBER: exit code 1 where the model scores less.",
    "max.": "max.METRIC=NUMBER: exit code 1 where the model scores more.",
}
DEFAULTS = ("output=unused",)


def run(
    config: Config,
    base: str = "",
    metrics: str = "exact",
    prompts: str = "100",
    new_tokens: str = "256",
    shown: str = "3",
    json: str = "",
    bounds: Mapping[str, str] | None = None,
) -> int:
    """Print what the model scores. Returns 1 where a `min.` or `max.` is missed, else 0."""
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    for name in names:
        check_metric(name)
    limits = _limits(bounds or {})
    count = whole_number("eval: prompts", prompts, 0)
    longest_answer = whole_number("eval: new_tokens", new_tokens)
    folder = config.model.path
    named = base_of(folder)
    adapter = None if named is None else folder
    model = _model(config, base or named) if adapter else config.model
    console = Console(highlight=False, soft_wrap=True)
    tokenizer, max_length = tokenizer_and_length(config.model_copy(update={"model": model}))
    encoder = Encoder(tokenizer, config.data, max_length)
    corpus = encoded(console, config, encoder)
    found = prompts_of(corpus, tokenizer, encoder.stop_ids, count)
    console.print(f"data     {corpus.ledger.summary()}; {len(found):,} prompts")
    asked = Asked(
        corpus, tokenizer, encoder.stop_ids, found, names, longest_answer, seed=config.seed
    )
    judged = _judged(console, config, model, adapter, base, asked)
    _print(console, judged)
    _show(console, judged, whole_number("eval: shown", shown, 0))
    if json:
        write_json(json, {name: _as_json(judgement) for name, judgement in judged.items()})
    missed = _missed(limits, judged["model"].numbers)
    for line in missed:
        console.print(line, style="bold red", markup=False)
    return int(bool(missed))


def _judged(
    console: Console, config: Config, model: Model, adapter: str | None, base: str, asked: Asked
) -> dict[str, Judgement]:
    """What the model scores, and its base where there is one."""
    judged: dict[str, Judgement] = {}
    with machine(config.runtime) as here:
        with console.status("loading and measuring the model"):
            served = load_served(model, adapter, asked.corpus, here)
            judged["model"] = tuned = judge(served, asked, here)
        if served.adapter is not None:
            with console.status("measuring its base"), served.without_adapter():
                judged["base"] = judge(served, asked, here)
            tuned.numbers["kl"] = _distance_of_adapter(served, asked, tuned)
        elif base:
            with console.status("measuring the base"):
                other = load_served(_model(config, base), None, asked.corpus, here)
                judged["base"] = judge(other, asked, here)
                tuned.numbers["kl"] = distance(
                    served.forward, other.forward, asked.prompts, tuned.samples
                )
    return judged


def _model(config: Config, path: str | None) -> Model:
    return config.model.model_copy(update={"path": path})


def _distance_of_adapter(served: Served, asked: Asked, tuned: Judgement) -> float:
    def base(ids: Tensor) -> Tensor:
        with served.without_adapter():
            return served.forward(ids)

    return distance(served.forward, base, asked.prompts, tuned.samples)


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


def _print(console: Console, judged: Mapping[str, Judgement]) -> None:
    """One row for each number, one column for each model."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    columns = [name for name in ("base", "model") if name in judged]
    for name in columns:
        table.add_column(name, justify="right")
    for metric in judged["model"].numbers:
        values = [judged[name].numbers.get(metric) for name in columns]
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
    samples = [sample.as_record(0) for sample in judgement.samples]
    for number, sample in enumerate(samples):
        del sample["step"]
        sample["scores"] = {name: values[number] for name, values in judgement.scores.items()}
    return {"numbers": judgement.numbers, "samples": samples}
