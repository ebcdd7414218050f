# pyright: reportUnknownMemberType=false
# (the types of PyYAML are incomplete)
"""A strict subset of YAML, with the line of every key.

YAML 1.2's scalars instead of 1.1's: `1e-4` is a number, only `true` and `false` are booleans,
`0123` is text. A key may stand once; tags, anchors and aliases are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, cast

import yaml

from sftx.types import UserError

KeyPath = tuple[str | int, ...]
Places = dict[KeyPath, str]
"""Where each value was written, by its path of keys: `run.yaml:12`, or `command line`."""


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


class _StrictLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML reads it)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = cast(Any, self.peek_event())
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            reason = "anchors and aliases are not read: write the value out"
            raise yaml.MarkedYAMLError(problem=reason, problem_mark=event.start_mark)
        if event.tag:
            raise yaml.MarkedYAMLError(
                problem=f"tags such as {event.tag} are not read", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("bool", r"^(?:true|false)$", ["t", "f"]),
    ("int", r"^[-+]?(?:0|[1-9][0-9]{0,999})(?:[eE]\+?[0-9]{1,2})?$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE]-[0-9]+)$",
        list("-+.0123456789"),
    ),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class _StrictDumper(yaml.SafeDumper):
    """Writes what `_StrictLoader` reads as the same value.

    Text that looks like a number is quoted.
    """

    yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted_where_odd(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Text with line ends or invisible characters is quoted, with escapes: YAML folds some."""
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    )


_StrictDumper.add_representer(str, _quoted_where_odd)


def dump(value: Any) -> str:
    """`value` as YAML that `parse` reads as the same value."""
    return yaml.dump(value, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=100)


def parse(
    text: str, source: str, problems: list[str], *, numbered: bool = True
) -> tuple[Any, Places]:
    """The value that `text` spells, and the place of each of its keys.

    A place is `source:line`, or `source` if not `numbered`. Appends what is wrong with a value to
    `problems`. Raises `UserError` where the text is not YAML at all.
    """
    check_text_size(len(text), source)
    try:
        node = cast("yaml.Node | None", yaml.compose(text, Loader=_StrictLoader))
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


def dotted(path: KeyPath) -> str:
    """`("data", "train", 0, "path")` as `data.train[0].path`."""
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in path
    ).removeprefix(".")
