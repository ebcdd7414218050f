"""Nested settings by their dotted names."""

from __future__ import annotations

from collections.abc import Mapping

from sftx.types import Json


def flat(settings: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    """`{"batch": {"epochs": 2}}` as `{"batch.epochs": 2}`; an empty section stays as it is."""
    found: dict[str, Json] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
