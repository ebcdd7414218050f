"""Method configurations and their registry."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

from sftx.compat.trlx.names import Registry, by_name
from sftx.types import UserError

__getattr__ = by_name  # configurations of reinforcement learning
_METHODS = Registry("method")
register_method = _METHODS.register
get_method = _METHODS.get


class Section:
    """A part of the configuration; subclasses are dataclasses."""

    SECTION = ""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Construct from `config`. Raises UserError naming a key that is unknown or missing."""
        known = {field.name: field for field in fields(cls)}  # pyright: ignore[reportArgumentType]
        refuse_unknown(config, known, f"{cls.SECTION}.")
        for name, field in known.items():
            if name not in config and field.default is field.default_factory is MISSING:
                raise UserError(f"parameter {cls.SECTION}.{name} is missing from the config")
        return cls(**config)


def refuse_unknown(given: Iterable[str], known: Collection[str], section: str = "") -> None:
    """Raise UserError for a name that is not known, with the one that may be meant."""
    for name in given:
        if name in known:
            continue
        what = "known" if section else "known sections"
        hint = f"{what}: {', '.join(known)}"
        for close in get_close_matches(name, known, 1):
            hint = f"did you mean {section}{close}?"
        raise UserError(
            f"parameter {section}{name} is not present in the config (typo or a wrong config); "
            f"{hint}"
        )


@register_method
@dataclass
class MethodConfig(Section):
    """Configuration of a method; `name` is the one it is registered under."""

    SECTION = "method"

    name: str
