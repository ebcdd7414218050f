"""Standard benchmarks: tasks of lm-eval (the LM evaluation harness), run on a model as it is served.

The tasks, their prompts and their metrics are lm-eval's, and so are the numbers. Here a model is
loaded, with its adapter, and given to lm-eval with its tokenizer and its chat template.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NotRequired, Protocol, TypedDict

import torch

from sftx.boundary import boundary, cause
from sftx.data.chat.template_files import template_texts
from sftx.data.tokenizer import Tokenizer
from sftx.eval.served import Adapter, put_adapter
from sftx.model.load import load_model
from sftx.model.runtime import Machine
from sftx.model.save import load_tokenizer
from sftx.printable import printable
from sftx.settings.schema import Model
from sftx.types import UserError

BATCH = 8
"""How many requests a GPU computes together; a CPU takes one, which needs no padding."""


class _Manager(Protocol):
    """What is used of lm_eval.tasks.TaskManager."""

    @property
    def all_tasks(self) -> Sequence[str]: ...
    def match_tasks(self, task_list: list[str], /) -> list[str]: ...


_Results = TypedDict(
    "_Results",
    {
        "results": dict[str, dict[str, object]],
        "groups": NotRequired[dict[str, dict[str, object]]],
        "versions": dict[str, object],
        "n-shot": dict[str, int],
        "n-samples": dict[str, dict[str, int]],
    },
)
"""What is read of lm-eval's results."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """What is asked: `names`, known to `manager`; of each task the first `limit` rows, all where it
    is None. `chat`: whether a chat template writes the prompts; None: where there is one.
    """

    names: Sequence[str]
    manager: _Manager
    limit: int | None = None
    chat: bool | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """`numbers` by "TASK METRIC"; `tasks`: of each task its version, the number of examples shown
    before a question, and how many questions were asked of how many.
    """

    numbers: dict[str, float]
    tasks: dict[str, dict[str, object]]


def find_tasks(names: Sequence[str], folder: str, limit: int | None, chat: bool | None) -> Tasks:
    """The tasks of these names: those that come with lm-eval, and those of the YAML files in
    `folder`, where it is not empty.

    Raises:
        UserError: lm-eval is not installed, or there is no such folder or task.
    """
    module = _lm_eval("tasks")
    if folder and not Path(folder).is_dir():
        raise UserError(f"tasks_path: there is no folder {printable(folder)}")
    with boundary(f"tasks_path={folder}: the task files cannot be read"):
        manager: _Manager = module.TaskManager(include_path=folder or None)
        known = list(manager.all_tasks)
        unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        close = get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {close[0]}?" if close else "tasks_path= names a folder of your own"
        raise UserError(f"tasks: lm-eval knows no task {printable(unknown[0])!r}; {hint}")
    return Tasks(manager.match_tasks(list(names)), manager, limit, chat)


def score(
    model: Model,
    adapter: Adapter | None,
    compares: bool,
    template: str,
    tasks: Tasks,
    machine: Machine,
) -> dict[str, Scores]:
    """What `model` scores, as "model"; with an `adapter` in it, and where it `compares`, also without
    that, as "base".

    `template`: as `data.template`. Weights are float32.

    Raises:
        UserError: the model is damaged, there is no chat template where one is asked for, or a task
            cannot be run: its data is not on this disk and cannot be fetched, its file is damaged.
    """
    texts = template_texts(template, Tokenizer.of_model(model)) if tasks.chat is not False else {}
    if tasks.chat and not texts:
        raise UserError(f"chat=true: {model.path} has no chat template; data.template= names one")
    tokenizer = load_tokenizer(model)
    if texts:
        tokenizer.chat_template = texts["default"].text
    loaded = load_model(model, machine.device).eval()
    wrapped = None if adapter is None else put_adapter(loaded, adapter).eval()
    half = None if machine.precision == torch.float32 else machine.precision
    with boundary(f"lm-eval does not take the model {model.path}"):
        harness = _lm_eval("models.huggingface").HFLM(
            pretrained=loaded,
            tokenizer=tokenizer,
            batch_size=1 if machine.device.type == "cpu" else BATCH,
            mixed_precision_dtype=half,
        )
    scores: dict[str, Scores] = {}
    if wrapped is not None and compares:
        with wrapped.disable_adapter():
            scores["base"] = _run(harness, tasks, is_chat=bool(texts))
    scores["model"] = _run(harness, tasks, is_chat=bool(texts))
    return scores


def _run(harness: object, tasks: Tasks, is_chat: bool) -> Scores:
    """What the model in lm-eval's `harness` scores."""
    evaluator = _lm_eval("evaluator")
    with boundary(f"tasks={','.join(tasks.names)} cannot be run"):
        found: _Results = evaluator.simple_evaluate(
            harness,
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            limit=tasks.limit,
            apply_chat_template=is_chat,
            fewshot_as_multiturn=is_chat,
            log_samples=False,
        )
    return _scores(found)


def _lm_eval(name: str) -> ModuleType:
    """A module of lm-eval, which says no more than what went wrong."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return import_module(f"lm_eval.{name}")
    except ImportError as error:
        raise UserError(
            f"tasks= needs lm-eval ({cause(error)}): pip install 'sftx[benchmarks]'"
        ) from error


def _scores(found: _Results) -> Scores:
    """The numbers of lm-eval's results, whose keys are METRIC,FILTER; the filter `none` is not named."""
    numbers: dict[str, float] = {}
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and isinstance(value, int | float):
                name = f"{task} {metric}" if kind == "none" else f"{task} {metric} {kind}"
                numbers[name] = float(value)
    tasks: dict[str, dict[str, object]] = {
        task: {
            "version": found["versions"].get(task),
            "shots": found["n-shot"].get(task),
            "asked": count["effective"],
            "rows": count["original"],
        }
        for task, count in found["n-samples"].items()
    }
    return Scores(numbers, tasks)
