"""What every section of the settings has in common."""

from __future__ import annotations

from typing import cast

from pydantic import BaseModel, ConfigDict, model_validator

SHORT_FORMS = {"model": "path", "data": "train", "adapter": "method"}
"""Sections that may be written as their main setting alone.

`model: PATH` is short for `model: {path: PATH}`.
"""


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, every field documented."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        name = cls.__name__.lower()
        if name in SHORT_FORMS and isinstance(value, str):
            return {SHORT_FORMS[name]: value}
        if name == "data" and isinstance(value, list):
            return {"rows": cast("list[object]", value)}
        return value
