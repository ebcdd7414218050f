"""Vision-language checkpoints: the text part trains, the rest stays, all is saved as the class it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import sftx
from sftx.types import UserError

TEXT = {**tiny.SIZES, "vocab_size": 264, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
SEES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Qwen3.5": (
        "Qwen3_5",
        {
            "text_config": {
                **TEXT,
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "head_dim": 16,
                "num_hidden_layers": 4,
                "rope_parameters": {**ROTARY, "partial_rotary_factor": 0.25},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
            },
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
        "visual",
    ),
    "Gemma 3": (
        "Gemma3",
        {
            "text_config": {**TEXT, "head_dim": 8, "sliding_window": 8},
            "vision_config": SEES,
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
        "vision_tower",
    ),
    "Llama 4": (
        "Llama4",
        {
            "text_config": {
                **TEXT,
                "head_dim": 8,
                "intermediate_size_mlp": 64,
                "num_local_experts": 4,
            },
            "vision_config": {
                **SEES,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            "image_token_index": 5,
        },
        "vision_model",
    ),
    "Mistral 3": (
        "Mistral3",
        {
            "text_config": {**TEXT, "model_type": "mistral", "head_dim": 8},
            "vision_config": {**SEES, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 5,
        },
        "vision_tower",
    ),
}
SLOW = {"Gemma 3", "Llama 4", "Mistral 3"}
ROWS = [[f"What is {i}?", f"It is {i}."] for i in range(6)]


def checkpoint(name: str, path: Path) -> str:
    """A tiny model of that name on disk, as it is published: in bf16, with a processor's settings."""
    family, settings, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).bfloat16()
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"size": 28}')
    return str(path)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS]
)
def test_the_text_part_trains_and_the_rest_stays(name: str, tmp_path: Path) -> None:
    path, out = checkpoint(name, tmp_path / "model"), tmp_path / "out"
    sftx.train(
        model=path,
        output=str(out),
        data={"rows": ROWS, "cache": str(tmp_path / "cache"), "max_length": 64},
        batch={"steps": 2},
        optim={"learning_rate": 0.01},
        runtime={"progress": False, "device": "cpu"},
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(path), out))
    assert before.keys() == after.keys()
    seen = MODELS[name][2]
    for key, tensor in before.items():
        if seen in key:
            assert torch.equal(after[key], tensor), key
    changed = [key for key, tensor in before.items() if not torch.equal(after[key], tensor)]
    assert any("q_proj" in key for key in changed)
    assert not any(seen in key or "projector" in key for key in changed)
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (Path(path), out))
    assert other["architectures"] == one["architectures"]
    assert (out / "preprocessor_config.json").read_text() == '{"size": 28}'
    facts = json.loads((out / "run.json").read_text())
    assert any("its text part trains" in note for note in facts["notes"])
    assert facts["parameters"]["trainable"] < facts["parameters"]["all"]


@pytest.mark.slow
def test_an_adapter_leaves_the_part_that_sees_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sftx.train(
        model=checkpoint("Gemma 3", tmp_path / "model"),
        output=str(out),
        data={"rows": ROWS, "cache": str(tmp_path / "cache"), "max_length": 64},
        batch={"steps": 1},
        adapter={"method": "lora", "rank": 2},
        runtime={"progress": False, "device": "cpu"},
    )
    names = load_file(out / "adapter_model.safetensors")
    assert names
    assert not any("vision" in name or "projector" in name for name in names)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}], "images": ["a.png"]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
                {"role": "assistant", "content": "A cat."},
            ]
        },
    ],
)
def test_images_in_rows_are_refused_by_name(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image"):
        sftx.train(
            model=tiny.folder(tmp_path / "model"),
            output=str(tmp_path / "out"),
            data={"rows": [row], "cache": str(tmp_path / "cache")},
            batch={"steps": 1},
            runtime={"progress": False, "device": "cpu"},
        )
