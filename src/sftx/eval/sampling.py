"""How the tokens of an answer are chosen: the model's own generation config, and what changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftx.model.save import serving_config

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. None: as the model's generation_config.json says."""

    max_tokens: int = 1024
    temperature: float | None = None  # 0 = always the most probable token
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()  # texts at which the answer is cut


AS_SAVED = Sampling()
"""As the model's folder says."""


def generation_config(
    model: PreTrainedModel,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = AS_SAVED,
) -> GenerationConfig:
    """The model's own configuration, which stops at `stop_ids` alone or after `max_new_tokens`
    tokens, and chooses tokens as `sampling` says.
    """
    config = serving_config(model, None, [])
    config.eos_token_id = list(stop_ids) or None
    if config.pad_token_id is None:
        config.pad_token_id = stop_ids[0] if stop_ids else 0
    config.max_new_tokens = max_new_tokens
    config.max_length = None
    for name in ("top_p", "top_k", "repetition_penalty"):
        value = getattr(sampling, name)
        if value is not None:
            setattr(config, name, value)
    if sampling.temperature is not None:
        config.do_sample = sampling.temperature > 0
        config.temperature = sampling.temperature
    if not config.do_sample:
        config.top_p = config.top_k = config.temperature = None
    return config
