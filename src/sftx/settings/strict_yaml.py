# pyright: reportUnknownMemberType=false
# (the types of PyYAML are incomplete)
"""A strict subset of YAML: what it allows, and writing it. `read_yaml` reads it.

YAML 1.2's scalars instead of 1.1's: `1e-4` is a number, only `true` and `false` are booleans,
`0123` is text. A key may stand once; tags, anchors and aliases are refused.
"""

from __future__ import annotations

import re
from typing import Any, cast

import yaml

KeyPath = tuple[str | int, ...]
Places = dict[KeyPath, str]
"""Where each value was written, by its path of keys: `run.yaml:12`, or `command line`."""


class StrictLoader(yaml.SafeLoader):
    """Reads the subset."""

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
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class _StrictDumper(yaml.SafeDumper):
    """Writes what `StrictLoader` reads as the same value.

    Text that looks like a number is quoted.
    """

    yaml_implicit_resolvers = StrictLoader.yaml_implicit_resolvers

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


def dotted(path: KeyPath) -> str:
    """`("data", "train", 0, "path")` as `data.train[0].path`."""
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in path
    ).removeprefix(".")
