"""Loggers under the name `trlx`, and their verbosity."""

from __future__ import annotations

from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING, Logger, getLogger

__all__ = ["CRITICAL", "DEBUG", "ERROR", "INFO", "WARNING", "get_logger", "get_verbosity", "set_verbosity"]


def get_logger(name: str = "") -> Logger:
    """A logger beneath `trlx`."""
    return getLogger(f"trlx.{name}" if name else "trlx")


def get_verbosity() -> int:
    """The level of all these loggers."""
    return getLogger("trlx").getEffectiveLevel()


def set_verbosity(level: int) -> None:
    """Set the level of all these loggers."""
    getLogger("trlx").setLevel(level)
