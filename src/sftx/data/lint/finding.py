"""A finding of `sftx lint`: one kind of problem, and the rows that have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Place = Callable[[int], str]
"""`file:line` of a row, from its number."""


@dataclass(slots=True)
class Finding:
    """One kind of problem: how many rows have it, where they stand, and which row each of them is
    like.
    """

    check: str
    serious: bool
    message: str
    count: int
    places: list[str]
    partners: list[str]  # as many as places; none where a row has the problem by itself


def finding(
    check: str,
    serious: bool,
    message: str,
    where: Iterable[int],
    place: Place,
    partner: Place | None = None,
) -> Finding:
    """A finding at the given indices or lines, each row named once."""
    indices = [int(i) for i in where]
    places = list(dict.fromkeys(map(place, indices)))
    partners: list[str] = []
    if partner is not None:
        of_place = {place(i): partner(i) for i in indices}
        partners = list(of_place.values())
    return Finding(check, serious, message, len(indices), places, partners)
