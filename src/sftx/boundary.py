"""The one place where whatever a library raises becomes a message to the user: reading the files of
a model folder.

A damaged or odd file makes transformers, tokenizers, safetensors and peft raise nearly anything:
KeyError, TypeError, ZeroDivisionError, even a panic of Rust code. Mistakes of sftx itself lie
outside and still show as tracebacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC

from sftx.types import UserError

LONGEST = 600  # characters of a cause that are shown; some libraries print a whole model


@contextmanager
def boundary(place: object, hint: str = "") -> Iterator[None]:
    """Inside, an error becomes a `UserError` that names the `place` (a file, or a setting and its
    value) and the cause.

    `hint` says what to do. A full disk and a lack of memory are no damage, and pass.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the libraries promise nothing about what they raise
        if isinstance(error, OSError) and error.errno == ENOSPC:
            raise
        raise UserError(f"{place}: {cause(error)}{hint}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust code; it derives from BaseException
            raise
        raise UserError(f"{place}: {cause(error)}{hint}") from error


def cause(error: BaseException) -> str:
    """What went wrong, on one line; the kind of error too where its text alone says little
    (`KeyError: 'x'`).
    """
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, OSError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
