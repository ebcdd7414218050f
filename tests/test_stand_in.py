"""The small stand-in on which start-up checks try what depends on length, and classes that are
unlike the others.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sftx.data.pack import build_pack, probe_pack
from sftx.model.checkpointing import decoder_layers
from sftx.model.checks.stand_in import kinds_of_layers, stand_in, vocabulary
from sftx.model.checks.start import check_paths
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.types import Example

TEXT: dict[str, Any] = {
    "vocab_size": 256,
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
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 11,
    "num_attention_heads": 2,
}


def model(name: str, **settings: Any) -> Any:
    config = AutoConfig.for_model(name, **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_the_decoder_is_found_beside_a_deeper_stack_for_images() -> None:
    layers = decoder_layers(model("gemma3", text_config=TEXT, vision_config=VISION))
    assert [type(layer).__name__ for layer in layers] == ["Gemma3DecoderLayer"] * 8


@pytest.mark.parametrize("name", ["gemma3", "gemma4_text"])
def test_a_stand_in_holds_every_kind_of_layer(name: str) -> None:
    """Gemma 4 has settings that go by the number of a layer, Gemma 3 here a tower for images deeper
    than the rest.
    """
    whole = (
        model(name, text_config=TEXT, vision_config=VISION)
        if name == "gemma3"
        else model(name, **TEXT)
    )
    small = stand_in(whole)
    assert small is not None
    kinds = kinds_of_layers(small)
    assert kinds == kinds_of_layers(whole)[: len(kinds)]
    assert set(kinds) == set(kinds_of_layers(whole))
    windows = {getattr(layer.self_attn, "sliding_window", None) for layer in decoder_layers(small)}
    assert windows == {
        getattr(layer.self_attn, "sliding_window", None) for layer in decoder_layers(whole)
    }


@pytest.mark.parametrize(
    ("name", "settings", "layers"),
    [
        # eight groups of experts, under another name than most
        pytest.param(
            "bailing_hybrid",
            {"num_hidden_layers": 3, "layer_group_size": 2},
            3,
            marks=pytest.mark.slow,
        ),
        # two attentions in every layer, each with a number
        pytest.param("longcat_flash", {"num_layers": 4}, 2, marks=pytest.mark.slow),
        # the last layers take keys and values of earlier ones
        (
            "gemma3n_text",
            {
                **TEXT,
                "num_hidden_layers": 10,
                "intermediate_size": [16384] * 10,
                "num_kv_shared_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 5,
            },
            8,
        ),
    ],
)
def test_a_small_copy_is_made_of_what_is_unlike_most(
    name: str, settings: dict[str, Any], layers: int
) -> None:
    small = stand_in(model(name, **settings))
    assert small is not None
    assert len(decoder_layers(small)) == layers


def test_tokens_without_a_row_of_the_head_are_not_drawn() -> None:
    small: Any = tiny.model("Llama")
    small.lm_head = torch.nn.Linear(32, 100, bias=False)
    assert vocabulary(small) == 100


ODD: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        **TEXT,
        "num_hidden_layers": 4,
        "intermediate_size": [48] * 4,
        "vocab_size_per_layer_input": 256,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "minimax_m3_vl_text": {
        **TEXT,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "blt": {},
}
"""Classes whose parts take other arguments, or whose configurations have other names, than most."""


def byte_latent_config() -> Any:
    """BLT at its smallest: it has no hidden size of its own, and four models inside."""
    config = AutoConfig.for_model("blt", encoder_hash_byte_group_vocab=500, patch_in_forward=False)
    sizes = {
        "hidden_size": 32,
        "hidden_size_global": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "head_dim": 8,
    }
    for part in (
        config.encoder_config,
        config.decoder_config,
        config.global_config,
        config.patcher_config,
    ):
        for name, size in sizes.items():
            if hasattr(part, name):
                setattr(part, name, size)
    config.global_config.hidden_size, config.global_config.head_dim = 64, 16
    return config


@pytest.mark.parametrize("name", ODD)
def test_odd_classes_pass_the_checks_and_are_exact(name: str) -> None:
    torch.manual_seed(0)
    config = byte_latent_config() if name == "blt" else AutoConfig.for_model(name, **ODD[name])
    plain = AutoModelForCausalLM.from_config(config).eval()
    data = tiny.examples([60, 9, 43], vocab_size=250)
    expected = sum(alone(copy.deepcopy(plain), example) for example in data)

    loss = PackLoss(plain).eval()
    notes = check_paths(loss, probe_pack(data), torch.float32, longest=60, largest_pack=120)
    assert all("which is exact" in note for note in notes)
    found = float(loss(to_tensors(build_pack(data), torch.device("cpu"))))
    assert found == pytest.approx(expected, rel=1e-6)


def alone(model: Any, example: Example) -> float:
    """The loss of an example by itself: the plain model, and torch's cross-entropy."""
    ids = torch.as_tensor(example.ids, dtype=torch.int64)
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return float((losses * torch.as_tensor(example.weights[1:])).sum())
