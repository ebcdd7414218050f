"""The base of trainers, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sftx.compat.trlx.data.configs import TRLConfig
from sftx.compat.trlx.registry import Registry
from sftx.compat.trlx.rl import refuse

_TRAINERS = Registry("train.trainer")
register_trainer = _TRAINERS.register


class BaseRLTrainer:
    """What a trainer is given. The name is trlx's; only supervised trainers can be made from it
    here.
    """

    def __init__(
        self,
        config: TRLConfig,
        reward_fn: Callable[..., Any] | None = None,
        metric_fn: Callable[..., Any] | None = None,
        logit_mask: Any = None,
        stop_sequences: Iterable[str] | None = None,
        train_mode: bool = False,
    ) -> None:
        if reward_fn is not None:
            refuse("reward_fn")
        if logit_mask is not None:
            refuse("logit_mask")
        self.config = config
        self.reward_fn = reward_fn
        self.metric_fn = metric_fn
        self.stop_sequences = list(stop_sequences or [])
        self.train_mode = train_mode
        self.store: Any = None
        self.eval_pipeline: Any = None

    def push_to_store(self, data: Iterable[Any]) -> None:
        """Append training elements."""
        self.store.push(data)

    def add_eval_pipeline(self, eval_pipeline: Any) -> None:
        """Set the prompts of evaluation."""
        self.eval_pipeline = eval_pipeline
