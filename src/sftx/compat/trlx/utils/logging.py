"""Loggers beneath `trlx`, their level and format, and whether there is a progress bar."""

from __future__ import annotations

import os
from collections.abc import Sequence
from logging import (  # noqa: F401 - scripts take the levels from here
    CRITICAL,
    DEBUG,
    ERROR,
    FATAL,
    INFO,
    NOTSET,
    WARN,
    WARNING,
    Formatter,
    Handler,
    Logger,
    LoggerAdapter,
    StreamHandler,
    getLogger,
)
from typing import Any

from tqdm import auto

log_levels = {
    "debug": DEBUG,
    "info": INFO,
    "warning": WARNING,
    "error": ERROR,
    "critical": CRITICAL,
}
EXPLICIT = "[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s"

_root = getLogger("trlx")
_handler = StreamHandler()
_progress_bar = True


class MultiProcessAdapter(LoggerAdapter[Logger]):
    """A logger whose methods take `ranks`: which processes log; default `["0"]`, `[]` for all."""

    def log(
        self, level: int, msg: object, *args: Any, ranks: Sequence[str] = ("0",), **kwargs: Any
    ) -> None:
        """Log where this process is among `ranks`."""
        if not ranks or os.environ.get("RANK", "0") in ranks:
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1  # the caller's line
            super().log(level, msg, *args, **kwargs)

    def warning_advice(self, message: object, *args: object, **kwargs: Any) -> None:
        """A warning, unless TRLX_NO_ADVISORY_WARNINGS is set."""
        if not os.environ.get("TRLX_NO_ADVISORY_WARNINGS"):
            self.warning(message, *args, **kwargs)


def get_logger(name: str | None = None) -> MultiProcessAdapter:
    """A logger beneath `trlx`."""
    return MultiProcessAdapter(getLogger(f"trlx.{name}" if name else "trlx"), {})


def get_log_levels_dict() -> dict[str, int]:
    """The levels by the names that TRLX_VERBOSITY takes."""
    return log_levels


get_verbosity = _root.getEffectiveLevel
set_verbosity = _root.setLevel
add_handler = _root.addHandler
remove_handler = _root.removeHandler


def enable_default_handler() -> None:
    """Write to stderr, as these loggers do from the start."""
    add_handler(_handler)


def disable_default_handler() -> None:
    """No longer write to stderr."""
    remove_handler(_handler)


def enable_propagation() -> None:
    """Hand what is logged on to Python's root logger too."""
    _root.propagate = True


def disable_propagation() -> None:
    """Keep what is logged from Python's root logger, as it is from the start."""
    _root.propagate = False


def enable_explicit_format() -> None:
    """Put time, level, file, line and function before every message, in all present handlers."""
    for handler in _root.handlers:
        handler.setFormatter(Formatter(EXPLICIT))


def reset_format() -> None:
    """Messages alone again."""
    for handler in _root.handlers:
        handler.setFormatter(None)


def is_progress_bar_enabled() -> bool:
    """Whether training shows its steps."""
    return _progress_bar


def enable_progress_bar() -> None:
    """Show the steps of training."""
    global _progress_bar
    _progress_bar = True


def disable_progress_bar() -> None:
    """Show no steps of training. What was done to the data is still said."""
    global _progress_bar
    _progress_bar = False


def tqdm(*args: Any, **kwargs: Any) -> Any:
    """A bar of tqdm, or a silent one where the progress bar is disabled."""
    return auto.tqdm(*args, **{**kwargs, "disable": kwargs.get("disable") or not _progress_bar})


def _configure() -> None:
    """Set the level that TRLX_VERBOSITY names, or `info`."""
    enable_default_handler()
    disable_propagation()
    wanted = os.environ.get("TRLX_VERBOSITY", "").lower()
    set_verbosity(log_levels.get(wanted, INFO))
    if wanted and wanted not in log_levels:
        _root.warning(
            "TRLX_VERBOSITY: found %r; known: %s; info is used", wanted, ", ".join(log_levels)
        )


_configure()
