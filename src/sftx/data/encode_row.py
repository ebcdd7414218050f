"""`sftx.encode`: what one row of data becomes, for whoever wants to look."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast
from weakref import WeakKeyDictionary

import numpy as np
from pydantic import ValidationError

from sftx.data.encoder import DECIDES, DEFAULT_LENGTH, Encoder
from sftx.data.oversize import check_size
from sftx.data.sources.formats import check_names, detect, renamed
from sftx.data.sources.rows import parse
from sftx.data.tokenizer import Tokenizer
from sftx.settings.schema import Data
from sftx.types import Example, Json, RowError, UserError

if TYPE_CHECKING:
    from sftx.settings.keywords import DataSettings

ENCODING = {*DECIDES, "weights", "format", "columns", "max_length", "on_bad_row"}
"""The settings of `data` that `encode` takes."""
_adapted: WeakKeyDictionary[object, tuple[tuple[str, int, str], Tokenizer]] = WeakKeyDictionary()


def encode(row: object, tokenizer: object, **settings: Unpack[DataSettings]) -> list[Example]:
    """What one row of data becomes: a list of examples with `ids` int32[T] and `weights`
    float32[T].

    `row` is a text, a [prompt, output, ...] list or a dictionary in any format; `tokenizer` a fast
    transformers tokenizer, a `Tokenizer`, or the path of one; `settings` those fields of `data`
    that decide how a row is encoded (`max_length`, `template`, `train_on`, ...). More than one
    example comes back where a row was split, or where its turns cannot share one sequence; none
    where it was dropped.

    Raises:
        UserError: the row or a setting is wrong; the message names the field.
    """
    if strange := settings.keys() - ENCODING:
        names = ", ".join(sorted(strange))
        known = ", ".join(sorted(ENCODING))
        raise UserError(f"encode: no setting {names}; known: {known}")
    try:
        data = Data.model_validate(settings)
    except ValidationError as error:
        problems: list[str] = []
        for problem in error.errors():
            place = ".".join(map(str, problem["loc"]))
            problems.append(f"{place}: {problem['msg']}")
        raise UserError("encode: " + "; ".join(problems)) from None
    state = json.dumps(data.model_dump())
    encoder = _encoder(_as_tokenizer(tokenizer), state, data.max_length or DEFAULT_LENGTH)
    try:
        check_names(data.columns)
        plain = renamed(_as_json(row), data.columns)
        form = detect(plain) if data.format == "auto" else data.format
        parsed = parse(plain, form)
        check_size(parsed, encoder.tokenizer)
        encoded = encoder.encode([parsed])[0]
        if isinstance(encoded, RowError):
            raise encoded
    except RowError:
        if data.on_bad_row == "skip":
            return []
        raise
    return list(encoded.examples)


@lru_cache(16)
def _encoder(tokenizer: Tokenizer, settings: str, max_length: int) -> Encoder:
    return Encoder(tokenizer, Data.model_validate_json(settings), max_length)


def _as_json(value: object) -> Json:
    """Tuples as lists and arrays as lists, as they would be had they come from a file."""
    match value:
        case dict():
            items = cast("dict[str, object]", value).items()
            return {key: _as_json(item) for key, item in items}
        case list() | tuple():
            return [_as_json(item) for item in cast("list[object]", value)]
        case np.ndarray() | np.generic():
            return cast("Json", value.tolist())
        case _:
            return cast("Json", value)


def _as_tokenizer(tokenizer: Any) -> Tokenizer:
    """A `Tokenizer` from one, from a transformers tokenizer (adapted once), or from a path."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        return _load_tokenizer(str(tokenizer))
    state = (str(tokenizer.chat_template), len(tokenizer), str(tokenizer.special_tokens_map))
    if tokenizer in _adapted:
        earlier, made = _adapted[tokenizer]
        if earlier == state:
            return made
    made = Tokenizer.of(tokenizer)
    _adapted[tokenizer] = state, made
    return made


_load_tokenizer = lru_cache(4)(Tokenizer.load)
