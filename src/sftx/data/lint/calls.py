"""What is likely wrong with the arguments of tool calls, seen over all rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from sftx.data.lint.finding import Finding, Place, finding
from sftx.data.sources.arguments import INVENTED, parameters
from sftx.types import Json, Message, Row

FEW = 5  # calls; fewer are no pattern


def _calls_of(messages: Sequence[Message]) -> Iterator[tuple[str, dict[str, Json]]]:
    """(name, arguments) of every call whose arguments are an object."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if isinstance(function["arguments"], dict):
                yield function["name"], function["arguments"]


class Calls:
    """The arguments of all tool calls: which are null almost everywhere, and which the tool does
    not have.
    """

    def __init__(self) -> None:
        self._times: Counter[tuple[str, str]] = Counter()
        self._null: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._strange: dict[int, set[str]] = defaultdict(set)
        self._left_out: list[int] = []

    def add(self, number: int, row: Row) -> None:
        """Look at the calls of row `number`."""
        if INVENTED in row.notes:
            self._left_out.append(number)
        known = parameters(row.tools)
        for name, arguments in _calls_of(row.messages):
            for key, value in arguments.items():
                self._times[name, key] += 1
                if value is None:
                    self._null[name, key].append(number)
                if name in known and key not in known[name]:
                    self._strange[number].add(f"{name}.{key}")

    def findings(self, place: Place) -> list[Finding]:
        """What was found in all rows."""
        names: list[str] = []
        rows: set[int] = set()
        for key in sorted(self._null):
            null = self._null[key]
            if len(null) >= max(0.9 * self._times[key], FEW):
                names.append(".".join(key))
                rows.update(null)
        strange: set[str] = set()
        for found in self._strange.values():
            strange |= found
        return [
            finding(
                "null arguments",
                False,
                f"rows with arguments that are null almost everywhere{_named(names)}",
                sorted(rows),
                place,
            ),
            finding("invented nulls", False, f"rows with {INVENTED}", self._left_out, place),
            finding(
                "strange arguments",
                True,
                f"rows with arguments that the tool does not have{_named(sorted(strange))}",
                sorted(self._strange),
                place,
            ),
        ]


def _named(names: Sequence[str]) -> str:
    """The first of some names, as they stand at the end of a message."""
    if not names:
        return ""
    more = ", ..." if len(names) > 5 else ""
    return ": " + ", ".join(names[:5]) + more
