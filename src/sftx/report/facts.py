"""run.json: what it says of a run, and the checks of one that may come from a stranger."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any

from sftx.boundary import boundary
from sftx.types import UserError

STATUS = ("running", "stopped", "diverged", "finished")
AGAIN = "; put a copy of it back, or move the folder away and start the run anew in an empty one"


@dataclass
class RunFacts:
    """What run.json says of a run, in its order; None and empty where it does not say it.

    `tracker_id`: what trackers know the run by. `padded`: packs ran as right-padded batches.
    `gguf`: name and hash of the GGUF file the run started from. `card`: licence, base and data as
    the model card names them. `changed`: settings that were
    changed on the way. `merged`: how far merging moved a logit.
    `best`: step, metric and value of the model that was written, where the best one was chosen.
    """

    status: str = ""
    tracker_id: str = ""
    started: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    mathematics: dict[str, Any] = field(default_factory=dict)
    plan: str = ""
    num_steps: int = 0
    device: str = ""
    precision: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    tokens_per_pack: int = 0
    context_parallel: int | None = None
    shares_prefixes: bool = False
    padded: bool = False
    notes: list[str] | None = None
    peak_learning_rate: float | None = None
    stop_id: int | None = None
    threads: int | None = None
    recomputed_layers: int | None = None
    predicted: dict[str, Any] | None = None
    trlx: dict[str, Any] | None = None
    gguf: dict[str, str] | None = None
    card: dict[str, Any] = field(default_factory=dict)
    eval_before: dict[str, float] | None = None
    changed: list[dict[str, Any]] | None = None
    ended_at: int | None = None
    stopped_at: int | None = None
    eval_after: dict[str, float] | None = None
    best: dict[str, Any] | None = None
    stopped_early: str | None = None
    measured: dict[str, float] | None = None
    total_tokens: int | None = None
    total_targets: int | None = None
    merged: float | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> RunFacts:
        """The facts in a run.json; those of other programs stay as they are."""
        names = {each.name for each in fields(cls)} - {"others"}
        known = {name: value for name, value in values.items() if name in names}
        others = {name: value for name, value in values.items() if name not in names}
        return cls(**known, others=others)

    def to_json(self) -> dict[str, Any]:
        """The contents of run.json."""
        values = asdict(self)
        others = values.pop("others")
        said = {k: v for k, v in values.items() if v is not None or k == "stop_id"}
        return said | others


def _is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is(kind: type | UnionType) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


# What is read again from a run.json, and what each must be. Other facts are for people and programs
# beside sftx.
_CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "status": (lambda value: value in STATUS, f"one of {', '.join(STATUS)}"),
    "config": (_is(dict), "an object"),
    "mathematics": (_is(dict), "an object"),
    "precision": (_is(str), "text"),
    "device": (_is(str), "text"),
    "tracker_id": (_is(str), "text"),
    "started": (_is(list), "a list"),
    "changed": (_is(list), "a list"),
    "notes": (_is(list), "a list"),
    "num_steps": (_is_count, "a whole number"),
    "tokens_per_pack": (
        lambda value: _is_count(value, least=1) and not _is_count(value, least=2**31),
        "a whole number of at least 1",
    ),
    "context_parallel": (
        lambda value: value is None or _is_count(value, least=1),
        "a whole number of at least 1",
    ),
    "shares_prefixes": (_is(bool), "true or false"),
    "eval_before": (_is(dict | None), "an object"),
    "eval_after": (_is(dict | None), "an object"),
}
NEEDED = ("status", "config", "mathematics", "precision", "device", "tokens_per_pack", "num_steps")
"""The facts without which a run cannot be continued or exported."""


def read_facts(path: Path) -> dict[str, Any]:
    """The facts in a run.json; {} if there is none.

    Raises:
        UserError: it is not JSON, no object, or a fact is not of its kind.
    """
    if not path.exists():
        return {}
    with boundary(f"{path}: this record of a run is damaged", AGAIN):
        facts = json.loads(path.read_bytes().decode("utf-8"))
    if not isinstance(facts, dict) or not facts:
        raise damaged(path, f"an object with facts is needed, found {str(facts)[:40]}")
    for name, (check, what) in _CHECKS.items():
        if name in facts and not check(facts[name]):
            raise damaged(path, f"{name} must be {what}, found {str(facts[name])[:60]!r}")
    return facts


def check_needed(facts: dict[str, object], path: Path) -> None:
    """UserError where the facts of `path` lack one of `NEEDED`.

    Where they lack all of them, another program wrote the file.
    """
    if not facts.keys() & set(NEEDED):
        raise UserError(f"{path} is a run.json that sftx did not write; choose another folder")
    missing = [name for name in NEEDED if name not in facts]
    if missing:
        raise damaged(path, f"{', '.join(missing)} is missing")


def damaged(path: Path, what: str) -> UserError:
    """The error that says what is wrong with a record, and what to do."""
    return UserError(f"{path}: this record of a run is damaged: {what}{AGAIN}")
