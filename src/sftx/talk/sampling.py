"""Settings of sampling that are given as text, on the command line or in a chat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from sftx.eval.sampling import Sampling
from sftx.printable import printable
from sftx.types import UserError

_WHOLE = ("max_tokens", "top_k", "seed")
_LEAST = {"max_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0}


def sampling_of(given: Mapping[str, str], now: Sampling | None = None) -> Sampling:
    """The settings `now`, changed by those given as text.

    Raises:
        UserError: one is not known, or not a number that it can be.
    """
    sampling = now or Sampling()
    for key, text in given.items():
        if key not in asdict(sampling):
            known = ", ".join(asdict(sampling))
            raise UserError(f"no setting {printable(key)!r} of sampling; there are: {known}")
        if key == "stop":
            sampling = replace(sampling, stop=(text,) if text else ())
            continue
        sampling = replace(sampling, **{key: _number(key, text)})
    return sampling


def _number(key: str, text: str) -> float | int:
    try:
        number = int(text) if key in _WHOLE else float(text)
    except ValueError as error:
        kind = "a whole number" if key in _WHOLE else "a number"
        raise UserError(f"{key}={printable(text)!r}: {kind} is needed") from error
    if key in _LEAST and not number >= _LEAST[key]:
        raise UserError(f"{key}={number}: at least {_LEAST[key]} is needed")
    if key == "top_p" and not 0 < number <= 1:
        raise UserError(f"top_p={number}: more than 0 and at most 1 is needed")
    if key == "repetition_penalty" and not number > 0:
        raise UserError(f"repetition_penalty={number}: more than 0 is needed")
    return number
