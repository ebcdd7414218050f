"""Raw rows become `Row`s: the eight shapes a row of data may have, how they are told apart, and
what is wrong with one.

The shape is decided once per file, from its first row; a later row of another shape is an error,
not a guess.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from sftx.data.sources.arguments import INVENTED, without_invented
from sftx.data.sources.foreign import check_columns
from sftx.data.sources.messages import SHAREGPT_ROLES, parse_messages
from sftx.data.sources.validate import (
    check_spelling,
    checked_text,
    checked_weight,
    from_json,
    kind_name,
)
from sftx.types import Message, Phrase, Row, RowError, UserError

# The fields that make a format, and those it may have besides. Any other column is unused, and said
# to be.
REQUIRED: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "pairs": ("prompt", "completion"),
    "dialogue": ("dialogue",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "segments": ("segments",),
    "tokens": ("input_ids",),
}
_CHAT = ("tools", "chat_template_kwargs")
OPTIONAL: dict[str, tuple[str, ...]] = {
    "pairs": ("system", "history", *_CHAT),
    "dialogue": ("system",),
    "messages": ("system", *_CHAT),
    "sharegpt": ("system", *_CHAT),
    "alpaca": ("input", "system", "history"),
    "tokens": ("labels", "weights"),
}
_QUESTIONS = (
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
    ("input", "output"),
)
_ELSEWHERE = {  # layouts other tools take, and what to do with them here
    **{
        names: f"; set data.columns: {{{names[0]}: prompt, {names[1]}: completion}}"
        for names in _QUESTIONS
    },
    (
        "prompt",
        "chosen",
    ): "; this is preference data: to train on what was chosen, data.columns: {chosen: completion}",
    (
        "chosen",
        "rejected",
    ): "; this is preference data: to train on what was chosen, data.columns: {chosen: messages}",
}
MOST_COLUMNS = 1000
"""Columns of a row, and fields of a message: more are a mistake, and comparing their names would
take minutes.
"""
SHOWN_COLUMNS = 10
_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "completion_masks")


def detect(raw: Any) -> str:
    """The format of a row by its shape.

    Raises:
        RowError: no format has this shape, or more than one.
    """
    if isinstance(raw, str):
        return "text"
    if isinstance(raw, list):
        return _detect_list(raw)
    if not isinstance(raw, dict):
        raise RowError(f"a row must be an object, a list of texts or a text, not {kind_name(raw)}")
    _check_count(raw)
    found = [name for name, fields in REQUIRED.items() if all(field in raw for field in fields)]
    if "tokens" in found:  # columns made from others: the tokens are what was meant
        return "tokens"
    if found == ["sharegpt"] and _all_have("role", raw["conversations"]):
        raise RowError(
            "`conversations` holds role and content: set data.columns: {conversations: messages}"
        )
    if len(found) > 1:
        raise RowError(
            f"the row fits the formats {' and '.join(found)}; choose one with data.format"
        )
    if not found:
        raise RowError(_unknown_shape(raw))
    return found[0]


def _detect_list(raw: list[Any]) -> str:
    if raw and all(isinstance(item, str) for item in raw):
        return "dialogue"
    if _all_have("role", raw):
        return "messages"
    if _all_have("from", raw):
        return "sharegpt"
    if raw and all(isinstance(item, int) for item in raw):
        raise RowError(
            'a list of numbers: write tokens as {"input_ids": [...], "labels" or "weights": [...]}'
        )
    raise RowError(
        "a list must hold prompt and output texts in turn, or messages with role and content"
    )


def _all_have(field: str, value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and field in item for item in value)
    )


def _unknown_shape(raw: dict[str, Any]) -> str:
    advice = (text for fields, text in _ELSEWHERE.items() if all(field in raw for field in fields))
    hints = (
        _misnamed(field, raw)
        for fields in REQUIRED.values()
        for field in fields
        if field not in raw
    )
    shapes = " | ".join("+".join(fields) for fields in REQUIRED.values())
    more = next(filter(None, (*advice, *hints)), f"; expected one of {shapes}")
    return f"no format has the columns {_names(raw)}{more}"


def _names(raw: dict[str, Any]) -> str:
    """The names of a row's columns, the first of them where there are many."""
    names = [str(name) for name in raw]
    more = f" and {len(names) - SHOWN_COLUMNS:,} more" if len(names) > SHOWN_COLUMNS else ""
    return (", ".join(names[:SHOWN_COLUMNS]) or "none") + more


def _check_count(raw: dict[str, Any]) -> None:
    """RowError for a row of more columns than any format could have."""
    if len(raw) > MOST_COLUMNS:
        raise RowError(
            f"the row has {len(raw):,} columns, at most {MOST_COLUMNS:,} are read; leave the "
            "others out"
        )


def _misnamed(field: str, raw: dict[str, Any]) -> str:
    """A hint, if a row has a column with almost the name of the `field` that it lacks."""
    close = difflib.get_close_matches(field, map(str, raw), 1, 0.75)
    return f"; did you mean {field!r} where it says {close[0]!r}?" if close else ""


def renamed(raw: Any, columns: Mapping[str, str | None]) -> Any:
    """A raw row with its columns named as `data.columns` says, without those that it names null.

    Raises:
        RowError: two columns would have the same name.
    """
    if not columns or not isinstance(raw, dict):
        return raw
    made: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for column, value in raw.items():
        name = columns.get(column, column)
        if name is None:
            continue
        if name in made:
            raise RowError(
                f"data.columns: the columns {origin[name]!r} and {column!r} would both be "
                f"{name!r}; "
                "name the one to leave out null"
            )
        made[name], origin[name] = value, column
    return made


def check_names(columns: Mapping[str, str | None]) -> None:
    """`UserError` if `data.columns` gives a column a name that no format reads."""
    known = {name for names in (*REQUIRED.values(), *OPTIONAL.values()) for name in names}
    for column, name in columns.items():
        if name is not None and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise UserError(
                f"data.columns: {column}: {name!r} is a column that no format reads; {hint}"
            )


def parse(raw: Any, form: str) -> Row:
    """A raw row of a known format (one of `REQUIRED`) as a `Row`.

    Raises:
        RowError: the row has another shape, or a field of it is wrong. The message names the field.
    """
    fields = REQUIRED[form]
    if not isinstance(raw, dict):
        wrapped = {"text": str, "dialogue": list, "messages": list, "sharegpt": list}.get(form, ())
        if not isinstance(raw, wrapped):
            raise RowError(
                f"expected an object with {' and '.join(fields)} (format {form}), found "
                f"{kind_name(raw)}"
            )
        raw = {fields[0]: raw}
    _check_count(raw)
    for field in fields:
        if field not in raw:
            found = _names(raw)
            hint = (
                _misnamed(field, raw)
                or "; a file has one format, the first row's unless data.format names another"
            )
            raise RowError(f"field {field!r} is missing (format {form}); found {found}{hint}")
    if bad := _misspelt(tuple(raw), form):
        raise RowError(bad)
    check_columns(raw, form)
    return _PARSERS[form](raw)


@lru_cache(1024)
def unused(columns: tuple[str, ...], form: str) -> tuple[str, ...]:
    """The columns of a row that its format does not read."""
    known = {*REQUIRED[form], *OPTIONAL.get(form, ())}
    return tuple(column for column in columns if column not in known)


@lru_cache(1024)
def _misspelt(columns: tuple[str, ...], form: str) -> str:
    for column in unused(columns, form):
        close = difflib.get_close_matches(
            str(column), [o for o in OPTIONAL.get(form, ()) if o not in columns], 1, 0.8
        )
        if close:
            return f"unknown field {column!r}; did you mean {close[0]!r}?"
        if form == "tokens" and column in _MASKS:
            return f"field {column!r} is not read; rename it to 'weights'"
    return ""


def _text_row(raw: dict[str, Any]) -> Row:
    return Row("text", text=checked_text(raw["text"], "text"))


def _pairs(raw: dict[str, Any]) -> Row:
    prompt, completion = raw["prompt"], raw["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        if raw.get("history"):
            raise RowError(
                "field 'history' needs prompt and completion to be texts; put its turns into the "
                "prompt"
            )
        (prompt, one), (completion, other) = (
            without_invented(given, _tools(raw)) for given in (prompt, completion)
        )
        asked = _behind_system(raw, parse_messages(prompt, "prompt"))
        before: list[Message] = [{**m, "train": False} for m in asked]
        row = _chat(raw, tuple(before) + parse_messages(completion, "completion"))
        row.notes = (INVENTED,) if one or other else ()
        return row
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(
            "fields 'prompt' and 'completion' must both be texts or both be lists of messages"
        )
    for field in _CHAT:
        if raw.get(field):
            raise RowError(f"field {field!r} needs prompt and completion to be lists of messages")
    pair = (
        Phrase(checked_text(prompt, "prompt"), 0.0),
        Phrase(checked_text(completion, "completion"), 1.0),
    )
    return _phrases(raw, (*_history(raw), *pair))


def _dialogue(raw: dict[str, Any]) -> Row:
    texts = _full_list(raw, "dialogue", "texts")
    if len(texts) % 2:
        raise RowError(
            f"a dialogue is [prompt, output, prompt, output, ...]; this one has {len(texts)} "
            "phrases, an odd number"
        )
    phrases = tuple(
        Phrase(checked_text(t, f"dialogue[{i}]"), float(i % 2)) for i, t in enumerate(texts)
    )
    return _phrases(raw, phrases)


def _messages_row(raw: dict[str, Any]) -> Row:
    given, invented = without_invented(raw["messages"], _tools(raw))
    row = _chat(raw, _behind_system(raw, parse_messages(given, "messages")))
    row.notes = (INVENTED,) if invented else ()
    return row


def _alpaca(raw: dict[str, Any]) -> Row:
    prompt, output = (
        checked_text(raw["instruction"], "instruction"),
        checked_text(raw["output"], "output"),
    )
    if extra := raw.get("input"):
        prompt = f"{prompt}\n\n{checked_text(extra, 'input')}"
    return _phrases(raw, (*_history(raw), Phrase(prompt, 0.0), Phrase(output, 1.0)))


def _history(raw: dict[str, Any]) -> list[Phrase]:
    """The earlier turns in a row's `history`: a list of [prompt, output]. Its outputs are targets
    too.
    """
    phrases = []
    given = raw.get("history") or []
    if not isinstance(given, list):
        raise RowError(
            f"field 'history' must be a list of [prompt, output], not {kind_name(given)}"
        )
    for i, pair in enumerate(given):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{i}] must be [prompt, output], not {kind_name(pair)}")
        phrases.append(Phrase(checked_text(pair[0], f"history[{i}][0]"), 0.0))
        phrases.append(Phrase(checked_text(pair[1], f"history[{i}][1]"), 1.0))
    return phrases


def _phrases(raw: dict[str, Any], phrases: tuple[Phrase, ...]) -> Row:
    """Prompts and outputs in turn; as messages where a system message stands before them."""
    if not raw.get("system"):
        return Row("phrases", phrases=phrases)
    turns: list[Message] = [
        {"role": "assistant" if phrase.weight else "user", "content": phrase.text}
        for phrase in phrases
    ]
    return Row("messages", messages=_behind_system(raw, tuple(turns)))


def _behind_system(raw: dict[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, behind the one in a row's `system` field where that is filled."""
    system = raw.get("system")
    if not system:
        return messages
    first: Message = {"role": "system", "content": checked_text(system, "system")}
    if messages[0].get("role") not in ("system", "developer"):
        return (first, *messages)
    if messages[0].get("content") != system:
        raise RowError(
            "field 'system' and the first message are both system messages, and differ; keep one "
            "of them"
        )
    return messages


def _segments(raw: dict[str, Any]) -> Row:
    phrases = []
    for i, piece in enumerate(_full_list(raw, "segments", '{"text", "weight"}')):
        at = f"segments[{i}]"
        if not isinstance(piece, dict) or not {"text", "weight"} <= piece.keys():
            raise RowError(f"{at} must be an object with text and weight")
        if extra := piece.keys() - {"text", "weight"}:
            raise RowError(f"{at} has unknown fields: {', '.join(sorted(extra))}")
        text, weight = (
            checked_text(piece["text"], f"{at}.text"),
            checked_weight(piece["weight"], f"{at}.weight"),
        )
        phrases.append(Phrase(text, weight))
    return Row("segments", phrases=tuple(phrases))


def _tokens(raw: dict[str, Any]) -> Row:
    ids = raw["input_ids"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise RowError("field 'input_ids' must be a list of whole numbers that is not empty")
    if bad := [i for i in (min(ids), max(ids)) if not 0 <= i <= 2**31 - 1]:
        raise RowError(f"field 'input_ids' holds {bad[0]}, which no vocabulary has")
    mask = raw.get("attention_mask")
    if isinstance(mask, list) and not all(mask):
        raise RowError(
            "field 'attention_mask' marks padding: remove the padded positions, rows need none"
        )
    if raw.get("position_ids") not in (None, list(range(len(ids)))):
        raise RowError(
            "field 'position_ids' starts anew: this is a pack of several documents; make each a "
            "row of its own"
        )
    labels, weights = raw.get("labels"), raw.get("weights")
    if labels is not None and weights is not None:
        raise RowError("give labels or weights, not both")
    for field, values in (("labels", labels), ("weights", weights)):
        if values is not None and (not isinstance(values, list) or len(values) != len(ids)):
            length = len(values) if isinstance(values, list) else kind_name(values)
            raise RowError(
                f"field {field!r} must be a list as long as input_ids ({len(ids)}), found {length}"
            )
    if weights is not None:
        weights = [checked_weight(w, f"weights[{i}]") for i, w in enumerate(weights)]
    elif labels is not None:
        weights = [float(label != -100) for label in labels]
        for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (-100, token):
                hint = (
                    "; the labels look shifted by one: leave them unshifted"
                    if labels[:-1] == ids[1:]
                    else ""
                )
                raise RowError(
                    f"labels[{i}] is {label}, but must be -100 or equal to input_ids[{i}] = "
                    f"{token}{hint}"
                )
    return Row("tokens", ids=tuple(ids), weights=tuple(weights or [1.0] * len(ids)))


def _sharegpt(raw: dict[str, Any]) -> Row:
    turns = []
    for i, turn in enumerate(_full_list(raw, "conversations", "turns")):
        at = f"conversations[{i}]"
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise RowError(f"{at} must be an object with from and value")
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise RowError(
                f"{at}.from is {turn['from']!r}, an unknown role; known: "
                f"{', '.join(SHAREGPT_ROLES)}"
            )
        message = {k: v for k, v in turn.items() if k not in ("from", "value")} | {"role": role}
        if turn["from"] in ("function_call", "tool_call"):
            calls = turn["value"]
            calls = from_json(calls, f"{at}.value") if isinstance(calls, str) else calls
            message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        else:
            message |= {"content": turn["value"]}
        turns.append(message)
    return _chat(raw, _behind_system(raw, parse_messages(turns, "conversations")))


def _full_list(raw: dict[str, Any], field: str, items: str) -> list[Any]:
    value = raw[field]
    if not isinstance(value, list) or not value:
        raise RowError(f"field {field!r} must be a list of {items}, not {kind_name(value)}")
    return value


def _tools(raw: dict[str, Any]) -> list[dict[str, Any]]:
    tools = raw.get("tools")
    tools = from_json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("field 'tools' must be a list of tool descriptions")
    return tools


def _chat(raw: dict[str, Any], messages: tuple[Message, ...]) -> Row:
    tools, kwargs = _tools(raw), raw.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise RowError(f"field 'chat_template_kwargs' must be an object, not {kind_name(kwargs)}")
    if tools or kwargs:
        check_spelling(tools, "tools")
        check_spelling(kwargs, "chat_template_kwargs")
    return Row("messages", messages=messages, tools=tuple(tools), template_kwargs=kwargs)


_PARSERS: dict[str, Callable[[dict[str, Any]], Row]] = {
    "text": _text_row,
    "pairs": _pairs,
    "dialogue": _dialogue,
    "messages": _messages_row,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "segments": _segments,
    "tokens": _tokens,
}
