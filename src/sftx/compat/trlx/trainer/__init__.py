"""The registry of trainers."""

from __future__ import annotations

from sftx.compat.trlx.names import Registry, by_name

__getattr__ = by_name  # the base of trainers of reinforcement learning
_TRAINERS = Registry("train.trainer")
register_trainer = _TRAINERS.register
