"""How good one output is beside its reference: a number per sample.

A metric is a function `(outputs, references) -> list[float]`, one number per sample. `METRICS` has those
that come with sftx; `load_metric` makes one of a Python function in a file.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import cast

from sftx.boundary import boundary
from sftx.printable import printable
from sftx.types import UserError

Metric = Callable[[Sequence[str], Sequence[str]], list[float]]
"""From outputs and their references to a number per sample."""
OwnMetric = Callable[
    [Sequence[str], Sequence[str], Sequence[str], Sequence[str]], Mapping[str, Sequence[float]]
]
"""A metric of the user: `(samples, prompts, outputs, references)` to named numbers per sample."""

TAKEN = ("loss", "perplexity", "targets", "accuracy", "ended", "kl", "general loss")
"""Names that an evaluation gives to numbers of its own."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(output: str, reference: str) -> float:
    """1 where the two are the same text, white space at the ends apart."""
    return float(output.strip() == reference.strip())


def contains(output: str, reference: str) -> float:
    """1 where the output has the whole reference in it."""
    return float(reference.strip() in output)


def number(output: str, reference: str) -> float:
    """1 where the last numbers of both are equal, as the GSM8K data set is judged.

    Commas between digits do not count: 1,200 is 1200. A text without a number equals nothing.
    """
    ours = _last_number(output)
    theirs = _last_number(reference)
    return float(ours is not None and ours == theirs)


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    if found:
        return Decimal(found[-1].replace(",", ""))
    return None


def f1(output: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, as SQuAD defines it (arXiv:1606.05250).

    Case, punctuation and English articles do not count. Two texts without words are equal.
    """
    ours = _words(output)
    theirs = _words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    plain = text.lower().translate(_PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split()


def json_valid(output: str, reference: str) -> float:
    """1 where the output is one JSON value and nothing else; the reference does not matter."""
    try:
        json.loads(output, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def tool_call(output: str, reference: str) -> float:
    """1 where both make the same calls in the same order: equal names, equal arguments.

    A call is a JSON object with a name and with arguments (or parameters) anywhere in the text.
    Arguments given as JSON text are read. Where the reference has no such object (a template that
    writes calls in another form), the two texts must be the same but for white space.
    """
    expected = calls_in(reference)
    if not expected:
        return float(output.split() == reference.split())
    return float(calls_in(output) == expected)


def calls_in(text: str) -> list[tuple[str, object]]:
    """The (name, arguments) of all JSON objects in a text that are calls, in their order."""
    decoder = json.JSONDecoder()
    found: list[tuple[str, object]] = []
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value = None
            end = at + 1
        call = _call(value)
        if call is None:
            end = at + 1  # a call may stand inside: {"function": {"name": ...}}
        else:
            found.append(call)
        at = text.find("{", end)
    return found


def _call(value: object) -> tuple[str, object] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    for key in ("arguments", "parameters"):
        if key in value:
            return value["name"], _parsed(value[key])
    return None


def _parsed(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def rouge_l(outputs: Sequence[str], references: Sequence[str]) -> list[float]:
    """F-measure of the longest common subsequence of words, by the `rouge-score` package."""
    score = _needed("rouge_l", "rouge_score.rouge_scorer").RougeScorer(["rougeL"]).score
    return _of_each(lambda o, r: float(score(r, o)["rougeL"].fmeasure))(outputs, references)


def _by_sacrebleu(name: str, outputs: Sequence[str], references: Sequence[str]) -> list[float]:
    """`bleu` (with its smoothing) or `chrf` of each sample, 0 to 100."""
    score = getattr(_needed(name, "sacrebleu"), f"sentence_{name}")
    return _of_each(lambda o, r: float(score(o, [r]).score))(outputs, references)


def _needed(metric: str, module: str) -> ModuleType:
    """A module of the extra `eval`; UserError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise UserError(
            f"eval.metrics: {metric} needs {package}, which is not installed: pip install "
            "'sftx[eval]'"
        ) from error


def _of_each(metric: Callable[[str, str], float]) -> Metric:
    def over_all(outputs: Sequence[str], references: Sequence[str]) -> list[float]:
        return [metric(o, r) for o, r in zip(outputs, references, strict=True)]

    return over_all


METRICS: dict[str, Metric] = {
    "exact": _of_each(exact),
    "contains": _of_each(contains),
    "number": _of_each(number),
    "f1": _of_each(f1),
    "json_valid": _of_each(json_valid),
    "tool_call": _of_each(tool_call),
    "rouge_l": rouge_l,
    "bleu": partial(_by_sacrebleu, "bleu"),
    "chrf": partial(_by_sacrebleu, "chrf"),
}
"""The metrics by name, as `eval.metrics` and `sftx eval metrics=` name them."""


def check_metric(metric: str | OwnMetric) -> None:
    """`UserError` now, before anything is computed, for a metric that is not there."""
    if not isinstance(metric, str):
        return
    if ":" in metric:
        load_metric(metric)
        return
    if metric not in METRICS:
        raise UserError(
            f"metric {printable(metric)!r} is not known: one of {', '.join(METRICS)}, or "
            "file.py:function"
        )
    METRICS[metric]([], [])  # needs its package


@cache
def load_metric(place: str) -> OwnMetric:
    """The function that `file.py:function` names. `UserError` where there is none."""
    file, _, name = place.rpartition(":")
    path = Path(file)
    where = f"metric {printable(place)!r}"
    if not path.is_file():
        raise UserError(f"{where}: there is no file {printable(file)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: {printable(file)} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    with boundary(f"{where}: {printable(file)} cannot be run"):
        spec.loader.exec_module(module)
    function = vars(module).get(name)
    if not callable(function):
        raise UserError(f"{where}: {printable(file)} has no function {name!r}")
    return cast(OwnMetric, function)


def score(
    metrics: Sequence[str | OwnMetric],
    prompts: Sequence[str],
    outputs: Sequence[str],
    references: Sequence[str],
) -> dict[str, list[float]]:
    """Every metric for every sample: lists as long as `outputs`, by name.

    A metric of the user, a function or its place, may give several. `UserError` where it raises, or
    gives something else than one finite number for each sample.
    """
    scores: dict[str, list[float]] = {}
    for metric in metrics:
        if isinstance(metric, str) and ":" not in metric:
            scores[metric] = METRICS[metric](outputs, references)
            continue
        samples = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
        function = load_metric(metric) if isinstance(metric, str) else metric
        where = f"metric {name_of(metric)!r}"
        with boundary(where):
            given = function(samples, prompts, outputs, references)
        scores |= _checked(where, given, len(outputs))
    return scores


def name_of(metric: str | OwnMetric) -> str:
    """A metric as the settings name it."""
    return printable(
        metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
    )


def _checked(where: str, given: object, count: int) -> dict[str, list[float]]:
    if not isinstance(given, Mapping):
        raise UserError(
            f"{where} returned {type(given).__name__}; a dictionary of lists is needed, one number "
            "for each sample"
        )
    checked: dict[str, list[float]] = {}
    for name, values in given.items():
        if name in TAKEN:
            raise UserError(f"{where}: {name!r} is the name of another number; choose another")
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {name!r} holds something else than numbers") from error
        if len(numbers) != count:
            raise UserError(f"{where}: {name!r} has {len(numbers)} numbers for {count} samples")
        bad = next((i for i, value in enumerate(numbers) if not math.isfinite(value)), None)
        if bad is not None:
            raise UserError(f"{where}: {name!r} of sample {bad} is {numbers[bad]}")
        checked[str(name)] = numbers
    return checked
