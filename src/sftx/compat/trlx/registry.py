"""Classes by name: trlx's configurations name their method, trainer and pipeline."""

from __future__ import annotations

from typing import Any

from sftx.compat.trlx.rl import by_name
from sftx.types import UserError


class Registry:
    """Classes by name, in any case of letters."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.classes: dict[str, Any] = {}

    def register(self, name: Any) -> Any:
        """A class decorator, with a name (`@register_method("mine")`) or without one
        (`@register_method`).
        """
        if isinstance(name, str):
            return lambda cls: self._add(name, cls)
        return self._add(name.__name__, name)

    def _add(self, name: str, cls: Any) -> Any:
        self.classes[name.lower()] = cls
        return cls

    def get(self, name: str) -> Any:
        """The class registered under `name`, or the stand-in of that name. Raises UserError if
        there is none.
        """
        if name.lower() in self.classes:
            return self.classes[name.lower()]
        try:
            return by_name(name)
        except AttributeError:
            known = ", ".join(self.classes)
            raise UserError(f"{self.what} {name} has not been registered; known: {known}") from None
