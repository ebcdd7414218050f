"""The settings of `eval`: when a run evaluates, what it asks the model, and which model it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, field_serializer, model_validator

from sftx.settings.section import Section

Function = Annotated[Callable[..., Any], WithJsonSchema({"type": "string"})]
"""A function of the user, which only Python can give; files of settings name its place."""


def _place(function: Function) -> str:
    """The `file.py:function` that names a function, where it has a place."""
    code = getattr(function, "__code__", None)
    file = "" if code is None else code.co_filename
    return f"{file}:{getattr(function, '__name__', type(function).__name__)}"


class Eval(Section):
    """Held-out loss, and answers of the model to held-out prompts."""

    every: int = Field(default=0, ge=0)
    """Evaluate every so many steps; 0 = before the first step and after the last only."""
    at_start: bool = True
    """Evaluate before the first step, so that the gain can be seen."""
    prompts: int | str | list[Any] = 0
    """What the model answers at every evaluation, into samples.jsonl: so many held-out rows, or a
    file of rows, or rows (Python only). The prompt is all before a row's last output, which is the
    reference. 0 = none.
    """
    metrics: list[str | Function] = Field(default=["exact", "f1"])
    """How answers are judged: exact, contains, number, f1, json_valid, tool_call, rouge_l, bleu,
    chrf, or a function of your own, as file.py:function (in Python the function itself).
    """
    new_tokens: int = Field(default=256, ge=1)
    """Most tokens of an answer. Prompts that leave no room for them in the model are not asked."""
    general: bool | str | list[Any] = True
    """A text that the base knew, whose loss shows what is forgotten, where `prompts` is set: true =
    one that comes with sftx, else a file of rows, or rows (Python only).
    """
    keep_best: str | None = None
    """Write the model that was best by this number instead of the last one: loss, accuracy, any of
    `metrics`, ended, kl, `general loss`. Of losses, perplexity and kl the lowest is best, of the
    others the highest.
    """
    stop_after: int = Field(default=0, ge=0)
    """End after so many evaluations in a row without a gain in `keep_best` (or loss); 0 = never."""
    min_delta: float = Field(default=0.0, ge=0)
    """What counts as a gain for `stop_after`: more than this."""

    @field_serializer("metrics", when_used="json")
    def _named(self, metrics: list[str | Function]) -> list[str]:
        return [each if isinstance(each, str) else _place(each) for each in metrics]

    @field_serializer("prompts", "general", when_used="json")
    def _counted(self, value: bool | int | str | list[Any]) -> bool | int | str:
        return f"{len(value)} rows in memory" if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Eval:
        for name in ("keep_best", "stop_after"):
            if getattr(self, name) and not self.every:
                raise ValueError(f"`{name}` compares evaluations; set `every` too")
        if "min_delta" in self.model_fields_set and not self.stop_after:
            raise ValueError("`min_delta` says what counts as a gain for `stop_after`; set that")
        for name in ("metrics", "new_tokens", "general"):
            if name in self.model_fields_set and not self.prompts:
                raise ValueError(f"`{name}` is about answers; set `prompts` too")
        return self
