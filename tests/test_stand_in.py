"""The small stand-in on which start-up checks try what depends on length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sftx.model.recompute import decoder_layers
from sftx.model.stand_in import kinds_of_layers, stand_in

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 11, "num_attention_heads": 2}


def model(name: str, **settings: Any) -> Any:
    config = AutoConfig.for_model(name, **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_the_decoder_is_found_beside_a_deeper_stack_for_images() -> None:
    layers = decoder_layers(model("gemma3", text_config=TEXT, vision_config=VISION))
    assert [type(layer).__name__ for layer in layers] == ["Gemma3DecoderLayer"] * 8


@pytest.mark.parametrize("name", ["gemma3", "gemma4_text"])
def test_a_stand_in_holds_every_kind_of_layer(name: str) -> None:
    """Gemma 4 has settings that go by the number of a layer, Gemma 3 here a tower for images deeper than the rest."""
    whole = model(name, text_config=TEXT, vision_config=VISION) if name == "gemma3" else model(name, **TEXT)
    small = stand_in(whole)
    assert small is not None
    kinds = kinds_of_layers(small)
    assert kinds == kinds_of_layers(whole)[: len(kinds)]
    assert set(kinds) == set(kinds_of_layers(whole))
    windows = {getattr(layer.self_attn, "sliding_window", None) for layer in decoder_layers(small)}
    assert windows == {getattr(layer.self_attn, "sliding_window", None) for layer in decoder_layers(whole)}
