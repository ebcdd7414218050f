"""Loggers under the name `trlx`."""

from __future__ import annotations

from logging import Logger, getLogger


def get_logger(name: str = "") -> Logger:
    """A logger beneath `trlx`."""
    return getLogger(f"trlx.{name}" if name else "trlx")


def set_verbosity(level: int) -> None:
    """Set the level of all these loggers."""
    get_logger().setLevel(level)
