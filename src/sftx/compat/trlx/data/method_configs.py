"""Method configurations and their registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

from sftx.compat.trlx.registry import Registry
from sftx.compat.trlx.rl import by_name
from sftx.types import UserError

__getattr__ = by_name  # configurations of reinforcement learning
_METHODS = Registry("method")
register_method, get_method = _METHODS.register, _METHODS.get


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
                hint = (
                    f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
                )
                raise UserError(
                    f"parameter {prefix}{key} is not present in the config (typo or a wrong "
                    f"config); {hint}"
                )
        for name, field in known.items():
            if name not in config and field.default is MISSING and field.default_factory is MISSING:
                raise UserError(f"parameter {prefix}{name} is missing from the config")
        return cls(**config)


@register_method
@dataclass
class MethodConfig(FromDict):
    """Configuration of a method; `name` is the one it is registered under."""

    SECTION = "method"

    name: str
