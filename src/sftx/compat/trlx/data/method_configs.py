"""Method configurations and their registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

from sftx.compat.trlx.rl import refuse
from sftx.types import UserError

_METHODS: dict[str, type[MethodConfig]] = {}
REINFORCEMENT = ("ppoconfig", "ilqlconfig", "rftconfig", "dpoconfig", "nemoilqlconfig")


class FromDict:
    """Construction from a dictionary in which every key is known."""

    SECTION = ""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Construct from `config`. Raises UserError naming keys that are unknown or missing."""
        known = {field.name: field for field in fields(cls)}  # pyright: ignore[reportArgumentType] - all are dataclasses
        prefix = f"{cls.SECTION}." if cls.SECTION else ""
        for key in config:
            if key not in known:
                close = get_close_matches(key, known, 1)
                hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
                raise UserError(
                    f"parameter {prefix}{key} is not present in the config (typo or a wrong config); {hint}"
                )
        for name, field in known.items():
            if name not in config and field.default is MISSING and field.default_factory is MISSING:
                raise UserError(f"parameter {prefix}{name} is missing from the config")
        return cls(**config)


@dataclass
class MethodConfig(FromDict):
    """Configuration of a method; `name` is the one it is registered under."""

    SECTION = "method"

    name: str


def register_method(name: Any) -> Any:
    """Class decorator, with a name (`@register_method("mine")`) or without one (`@register_method`)."""

    def register(cls: type[MethodConfig], under: str) -> type[MethodConfig]:
        _METHODS[under.lower()] = cls
        return cls

    if isinstance(name, str):
        decorator: Callable[[type[MethodConfig]], type[MethodConfig]] = lambda cls: register(cls, name)  # noqa: E731
        return decorator
    return register(name, name.__name__)


register_method(MethodConfig)


def get_method(name: str) -> type[MethodConfig]:
    """The method configuration registered under `name`, in any case of letters."""
    if name.lower() in _METHODS:
        return _METHODS[name.lower()]
    if name.lower() in REINFORCEMENT:
        refuse(f"method {name}")
    raise UserError(f"method {name} has not been registered; known: {', '.join(_METHODS)}")
