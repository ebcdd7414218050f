# pyright: reportUnknownMemberType=false
# (the types of PyYAML are incomplete)
"""Reading the strict subset of YAML, with the line of every key."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, cast

import yaml

from sftx.settings.strict_yaml import KeyPath, Places, StrictLoader, dotted
from sftx.types import UserError

LARGEST = 256 << 10
"""Bytes of settings: a hundred times as many as a long file has.

Parsing takes about 10 microseconds a byte.
"""


def check_text_size(size: int, source: str) -> None:
    """UserError where `source` has more than `LARGEST` bytes."""
    if size > LARGEST:
        raise UserError(
            f"{source}: more than {LARGEST >> 10} KiB: this is no settings file. Rows belong into "
            "data files, which data.train names"
        )


def parse(
    text: str, source: str, problems: list[str], *, numbered: bool = True
) -> tuple[Any, Places]:
    """The value that `text` spells, and the place of each of its keys.

    A place is `source:line`, or `source` if not `numbered`. Appends what is wrong with a value to
    `problems`. Raises `UserError` where the text is not YAML at all.
    """
    check_text_size(len(text), source)
    try:
        node = cast("yaml.Node | None", yaml.compose(text, Loader=StrictLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}:{mark.line + 1}" if mark and numbered else source
        raise UserError(
            f"{place}: not readable as YAML: {error.problem or error.context}"
        ) from None
    except RecursionError:
        raise UserError(f"{source}: not readable as YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from None
    reader = _Reader(source, numbered, problems)
    return (None if node is None else reader.value(node, ())), reader.places


@dataclass
class _Reader:
    """From YAML's nodes to values: the place of each is kept, and what is wrong with it told."""

    source: str
    numbered: bool
    problems: list[str]
    places: Places = field(default_factory=dict[KeyPath, str])

    def value(self, node: yaml.Node, at: KeyPath) -> Any:
        """The value of a node that lies `at` these keys."""
        place = self.places.setdefault(at, self._place(node))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*at, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, at)
        number = _scalar(node)
        if isinstance(number, float) and not isfinite(number):
            self.problems.append(f"{place}: {dotted(at)}: {node.value} is too large a number")
        return number

    def _mapping(self, node: yaml.MappingNode, at: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{place}: {dotted(at)}: a key must be a plain word")
                continue
            path = (*at, key_node.value)
            if path in self.places:
                first = self.places[path]
                self.problems.append(f"{place}: {dotted(path)}: written twice, first at {first}")
            self.places.setdefault(path, place)
            values[key_node.value] = self.value(value_node, path)
        return values

    def _place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.numbered else self.source


def _scalar(node: yaml.Node) -> bool | int | float | str | None:
    text: str = node.value
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text == "true"
        case "int":
            digits, _, exponent = text.lower().partition("e")
            return int(digits) * 10 ** int(exponent or 0)
        case "float":
            return float(text)
        case _:
            return text
