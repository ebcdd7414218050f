"""Fields that other tools give a meaning: honoured where ours is the same, refused by name where it
is not.

What stands here would otherwise be read over, and the row trained as if it were not there.
"""

from __future__ import annotations

from functools import lru_cache

from sftx.data.sources.validate import kind_name
from sftx.types import Json, RowError

_TRAIN = {"training": "Axolotl", "loss": "ms-swift", "trainable": "Tinker"}
"""Names of our `train`: true or false on a message."""

_WEIGHT = "'weight', a number of at least 0 by which each token of the message counts"
_NO_MEDIA = "only text can be trained on"
_MEDIA = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _NO_MEDIA)
_MESSAGE = {
    "train_detail": "a part of a message has no weight of its own; write the row as segments or "
    "tokens",
    "loss_scale": f"write it as {_WEIGHT}",
    "loss_weight": f"write it as {_WEIGHT}",
    "loss_mask": "write it as 'train': true or false",
    "step_loss_mask": "write it as 'train': true or false",
    **_MEDIA,
}
"""Fields of a message that are refused unless they are empty, and what to do."""

_MARKS = {*_MESSAGE, *_TRAIN}

_PART = ("train", "training", "loss", "weight", "loss_scale", "loss_weight")
"""Marks on one part of a content."""

_COLUMN = {
    "functions": 'write it as \'tools\': [{"type": "function", "function": {...}}, ...]',
    **_MEDIA,
}
"""Columns of a row that are refused unless they are empty, and what to do."""

_LABELS = ("label", "kto_tag")
_BAD_ANSWER = "KTO marks an answer that is not wanted by false; leave such rows out"
_PREFERENCE = (
    "this is preference data, whose turns end before the answer; put the chosen answer behind them"
)
_WITH_ANSWERS = ("pairs", "dialogue", "messages", "sharegpt", "alpaca")
_LOOKED_AT = {*_COLUMN, *_LABELS, "objects", "chosen"}


def own_marks(message: dict[str, Json], at: str) -> None:
    """Rename the marks of other tools in a message to ours, in place.

    Raises:
        RowError: a mark has no equal here, is neither true nor false, or contradicts another.
    """
    if message.keys().isdisjoint(_MARKS):
        return
    for field, advice in _MESSAGE.items():
        if not _is_empty(message.get(field)):
            raise RowError(f"{at}.{field} is not read: {advice}")
        message.pop(field, None)
    for field in _TRAIN:
        if field in message:
            _rename(message, field, at)


def _rename(message: dict[str, Json], field: str, at: str) -> None:
    """Make another tool's name of `train` ours; raises as `own_marks` does."""
    value = message.pop(field)
    tool = _TRAIN[field]
    if not isinstance(value, bool):
        raise RowError(f"{at}.{field} must be true or false (as in {tool}), not {kind_name(value)}")
    if field == "loss" and value and message.get("role") != "assistant":
        raise RowError(
            f"{at}.loss: {tool} reads it on assistant messages only; to train this one, say "
            "train: true"
        )
    if message.setdefault("train", value) != value:
        raise RowError(f"{at} says train: {message['train']!r} and {field}: {value!r}")


def check_part(part: dict[str, Json], at: str) -> None:
    """`RowError` if a part of a content has a mark of its own."""
    for field in _PART:
        if part.get(field) is not None:
            raise RowError(f"{at}.{field} is not read: {_MESSAGE['train_detail']}")


def check_columns(raw: dict[str, Json], form: str) -> None:
    """`RowError` if a column that the format does not read says that the row should be trained
    otherwise.
    """
    for column in _looked_at(tuple(raw)):
        if advice := _objection(raw, column, form):
            raise RowError(
                f"column {column!r} is not read: {advice}; data.columns: {{{column}: null}} "
                "leaves the column out"
            )


@lru_cache(1024)
def _looked_at(columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(column for column in columns if column in _LOOKED_AT)


def _objection(raw: dict[str, Json], column: str, form: str) -> str:
    """Why a column may not be left unread, and what to do; "" if it may."""
    value = raw[column]
    if column in _LABELS:
        return _BAD_ANSWER if _is_false(value) and form in _WITH_ANSWERS else ""
    if _is_empty(value) or value is False:
        return ""
    if column == "objects":
        return _NO_MEDIA if _is_grounding(value) else ""
    if column == "chosen":
        return _PREFERENCE if _ends_unanswered(raw, form) else ""
    return _COLUMN[column]


def _is_false(value: Json) -> bool:
    return value is False or value in ("false", "False", "FALSE")


def _is_grounding(value: Json) -> bool:
    """Whether a value names places in a picture."""
    return isinstance(value, dict) and not value.keys().isdisjoint({"bbox", "ref"})


def _ends_unanswered(raw: dict[str, Json], form: str) -> bool:
    column = {"messages": "messages", "sharegpt": "conversations"}.get(form, "")
    turns = raw.get(column)
    if not isinstance(turns, list) or not turns:
        return False
    last = turns[-1]
    if not isinstance(last, dict):
        return False
    return last.get("role", last.get("from")) in ("user", "human")


def _is_empty(value: Json) -> bool:
    return value is None or value in ("", [], {})
