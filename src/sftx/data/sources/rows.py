"""Raw rows of a known format become `Row`s; a mistake in one is named with its field."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from sftx.data.sources.foreign import check_columns
from sftx.data.sources.formats import (
    CHAT_COLUMNS,
    REQUIRED,
    check_count,
    misnamed,
    misspelt,
    names_of_columns,
)
from sftx.data.sources.messages import SHAREGPT_ROLES, MessageReader
from sftx.data.sources.validate import (
    check_spelling,
    checked_list,
    checked_text,
    checked_weight,
    from_json,
    kind_name,
)
from sftx.types import Json, Message, Phrase, Row, RowError

_UNWRAPPED: dict[str, type] = {"text": str, "dialogue": list, "messages": list, "sharegpt": list}
"""The formats whose rows may be the value of their one column alone."""


def parse(value: object, form: str) -> Row:
    """A raw row of a known format (one of `REQUIRED`) as a `Row`.

    Raises:
        RowError: the row has another shape, or a field of it is wrong. The message names the field.
    """
    raw = cast("Json", value)
    fields = REQUIRED[form]
    if not isinstance(raw, dict):
        if form not in _UNWRAPPED or not isinstance(raw, _UNWRAPPED[form]):
            raise RowError(
                f"expected an object with {' and '.join(fields)} (format {form}), found "
                f"{kind_name(raw)}"
            )
        column: dict[str, Json] = {fields[0]: raw}
        raw = column
    check_count(raw)
    for field in fields:
        if field not in raw:
            hint = misnamed(field, raw)
            if not hint:
                hint = "; a file has one format, the first row's unless data.format names another"
            raise RowError(
                f"field {field!r} is missing (format {form}); found {names_of_columns(raw)}{hint}"
            )
    if problem := misspelt(tuple(raw), form):
        raise RowError(problem)
    check_columns(raw, form)
    row = _PARSERS[form](raw)
    if raw.get("weight") is not None:
        row.weight = _weight_of_row(raw["weight"])
    return row


def _weight_of_row(value: Json) -> float:
    try:
        return checked_weight(value, "weight")
    except RowError as error:
        raise RowError(f"{error}; data.columns: {{weight: null}} leaves the column out") from None


def _text_row(raw: dict[str, Json]) -> Row:
    return Row("text", text=checked_text(raw["text"], "text"))


def _pairs(raw: dict[str, Json]) -> Row:
    prompt = raw["prompt"]
    completion = raw["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(
            "fields 'prompt' and 'completion' must both be texts or both be lists of messages"
        )
    if isinstance(prompt, list):
        return _pair_of_messages(raw)
    for field in CHAT_COLUMNS:
        if raw.get(field):
            raise RowError(f"field {field!r} needs prompt and completion to be lists of messages")
    asked = checked_text(prompt, "prompt")
    answer = checked_text(completion, "completion")
    return _phrases(raw, [*_history(raw), Phrase(asked, 0.0), Phrase(answer, 1.0)])


def _pair_of_messages(raw: dict[str, Json]) -> Row:
    if raw.get("history"):
        raise RowError(
            "field 'history' needs prompt and completion to be texts; put its turns into the prompt"
        )
    tools = _tools(raw)
    reader = MessageReader(tools)
    messages: list[Message] = []
    prompts: list[int] = []
    for message in _behind_system(raw, reader.read(raw["prompt"], "prompt")):
        if message.get("train", True):
            prompts.append(len(messages))
        messages.append({**message, "train": False})
    messages += reader.read(raw["completion"], "completion")
    row = _chat(raw, tools, messages, reader.notes)
    row.prompts = frozenset(prompts)
    return row


def _dialogue(raw: dict[str, Json]) -> Row:
    texts = checked_list(raw["dialogue"], "dialogue", "texts")
    if len(texts) % 2:
        raise RowError(
            f"a dialogue is [prompt, output, prompt, output, ...]; this one has {len(texts)} "
            "phrases, an odd number"
        )
    return _phrases(raw, _in_turn(texts, "dialogue"))


def _in_turn(texts: list[Json], field: str) -> list[Phrase]:
    """Prompts and outputs in turn, beginning with a prompt."""
    return [
        Phrase(checked_text(text, f"{field}[{i}]"), float(i % 2)) for i, text in enumerate(texts)
    ]


def _messages(raw: dict[str, Json]) -> Row:
    tools = _tools(raw)
    reader = MessageReader(tools)
    messages = _behind_system(raw, reader.read(raw["messages"], "messages"))
    return _chat(raw, tools, messages, reader.notes)


def _alpaca(raw: dict[str, Json]) -> Row:
    prompt = checked_text(raw["instruction"], "instruction")
    output = checked_text(raw["output"], "output")
    if extra := raw.get("input"):
        prompt = f"{prompt}\n\n{checked_text(extra, 'input')}"
    return _phrases(raw, [*_history(raw), Phrase(prompt, 0.0), Phrase(output, 1.0)])


def _history(raw: dict[str, Json]) -> list[Phrase]:
    """The earlier turns in a row's `history`, a list of [prompt, output]. They are trained too."""
    phrases: list[Phrase] = []
    given = raw.get("history") or []
    if not isinstance(given, list):
        raise RowError(
            f"field 'history' must be a list of [prompt, output], not {kind_name(given)}"
        )
    for i, pair in enumerate(given):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{i}] must be [prompt, output], not {kind_name(pair)}")
        phrases += _in_turn(pair, f"history[{i}]")
    return phrases


def _phrases(raw: dict[str, Json], phrases: list[Phrase]) -> Row:
    """Prompts and outputs in turn; as messages where a system message stands before them."""
    if not raw.get("system"):
        return Row("phrases", phrases=tuple(phrases))
    messages: list[Message] = []
    for phrase in phrases:
        role = "assistant" if phrase.weight else "user"
        messages.append({"role": role, "content": phrase.text})
    prompts = frozenset(range(1, len(messages) + 1, 2))  # behind the system message
    return Row("messages", messages=tuple(_behind_system(raw, messages)), prompts=prompts)


def _behind_system(raw: dict[str, Json], messages: list[Message]) -> list[Message]:
    """The messages, behind the one in a row's `system` field where that is filled."""
    system = raw.get("system")
    if not system:
        return messages
    first: Message = {"role": "system", "content": checked_text(system, "system")}
    if messages[0].get("role") not in ("system", "developer"):
        return [first, *messages]
    if messages[0].get("content") != system:
        raise RowError(
            "field 'system' and the first message are both system messages, and differ; keep one "
            "of them"
        )
    return messages


def _segments(raw: dict[str, Json]) -> Row:
    phrases: list[Phrase] = []
    for i, piece in enumerate(checked_list(raw["segments"], "segments", '{"text", "weight"}')):
        at = f"segments[{i}]"
        if not isinstance(piece, dict) or not {"text", "weight"} <= piece.keys():
            raise RowError(f"{at} must be an object with text and weight")
        if extra := piece.keys() - {"text", "weight"}:
            raise RowError(f"{at} has unknown fields: {', '.join(sorted(extra))}")
        text = checked_text(piece["text"], f"{at}.text")
        phrases.append(Phrase(text, checked_weight(piece["weight"], f"{at}.weight")))
    return Row("segments", phrases=tuple(phrases))


def _tokens(raw: dict[str, Json]) -> Row:
    ids = _checked_ids(raw["input_ids"])
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
    labels = _as_long_as(ids, raw, "labels")
    weights = _as_long_as(ids, raw, "weights")
    if labels is not None and weights is not None:
        raise RowError("give labels or weights, not both")
    if labels is not None:
        _check_labels(labels, ids)
        found = [float(label != -100) for label in labels]
    elif weights is not None:
        found = [checked_weight(weight, f"weights[{i}]") for i, weight in enumerate(weights)]
    else:
        found = [1.0] * len(ids)
    return Row("tokens", ids=tuple(ids), weights=tuple(found))


def _checked_ids(value: Json) -> list[int]:
    if isinstance(value, list):
        ids = [item for item in value if type(item) is int]
        if ids and len(ids) == len(value):
            for extreme in (min(ids), max(ids)):
                if not 0 <= extreme <= 2**31 - 1:
                    raise RowError(f"field 'input_ids' holds {extreme}, which no vocabulary has")
            return ids
    raise RowError("field 'input_ids' must be a list of whole numbers that is not empty")


def _as_long_as(ids: list[int], raw: dict[str, Json], field: str) -> list[Json] | None:
    """The list in a field, which must have a value for each token; None if the row has no such."""
    values = raw.get(field)
    if values is None:
        return None
    if isinstance(values, list) and len(values) == len(ids):
        return values
    found = len(values) if isinstance(values, list) else kind_name(values)
    raise RowError(
        f"field {field!r} must be a list as long as input_ids ({len(ids)}), found {found}"
    )


def _check_labels(labels: list[Json], ids: list[int]) -> None:
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label in (-100, token):
            continue
        hint = ""
        if labels[:-1] == ids[1:]:
            hint = "; the labels look shifted by one: leave them unshifted"
        raise RowError(
            f"labels[{i}] is {label}, but must be -100 or equal to input_ids[{i}] = {token}{hint}"
        )


def _sharegpt(raw: dict[str, Json]) -> Row:
    turns = checked_list(raw["conversations"], "conversations", "turns")
    given = [_of_sharegpt(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    messages = _behind_system(raw, MessageReader([]).read(given, "conversations"))
    return _chat(raw, _tools(raw), messages, ())


def _of_sharegpt(turn: Json, at: str) -> Json:
    """A turn of the ShareGPT format as a message that is still to be checked."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise RowError(f"{at} must be an object with from and value")
    message = dict(turn)
    speaker = message.pop("from")
    value = message.pop("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise RowError(f"{at}.from is {speaker!r}, an unknown role; known: {known}")
    message["role"] = SHAREGPT_ROLES[speaker]
    if speaker not in ("function_call", "tool_call"):
        return {**message, "content": value}
    calls = from_json(value, f"{at}.value") if isinstance(value, str) else value
    return {**message, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _tools(raw: dict[str, Json]) -> list[dict[str, Json]]:
    """The tools of a row, also where they are written as JSON text."""
    given = raw.get("tools") or []
    if isinstance(given, str) and given.strip():
        given = from_json(given, "tools")
    tools: list[dict[str, Json]] = []
    for tool in given if isinstance(given, list) else [given]:
        if not isinstance(tool, dict) or tool is given:
            raise RowError("field 'tools' must be a list of tool descriptions")
        tools.append(tool)
    return tools


def _chat(
    raw: dict[str, Json],
    tools: list[dict[str, Json]],
    messages: list[Message],
    notes: tuple[str, ...],
) -> Row:
    kwargs = raw.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise RowError(f"field 'chat_template_kwargs' must be an object, not {kind_name(kwargs)}")
    if tools or kwargs:
        check_spelling(tools, "tools")
        check_spelling(kwargs, "chat_template_kwargs")
    return Row(
        "messages",
        messages=tuple(messages),
        tools=tuple(tools),
        template_kwargs=kwargs,
        notes=notes,
    )


_PARSERS: dict[str, Callable[[dict[str, Json]], Row]] = {
    "text": _text_row,
    "pairs": _pairs,
    "dialogue": _dialogue,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "segments": _segments,
    "tokens": _tokens,
}
