"""Write a GGUF file from a model's config, tokenizer and weights, through the package `gguf`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sftx.files import sync
from sftx.gguf.config import ARCHITECTURES, llama3_factors
from sftx.gguf.tensors import ROPE_FACTORS, Layout
from sftx.gguf.vocabulary import NAMED, STOPS, Vocabulary
from sftx.gguf.vocabulary_of import vocabulary_of
from sftx.types import Json, UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

Float32 = NDArray[np.float32]
KINDS = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
"""The types of matrices that are written here, and llama.cpp's number for a file of each."""


def layout_of(config: Mapping[str, Json]) -> Layout:
    """How the tensors of a model lie in GGUF; UserError where its family is not covered."""
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"format=gguf: a model of the family {model_type!r}; sftx writes {known}")
    heads = _whole(config, "num_attention_heads")
    return Layout(ARCHITECTURES[model_type], heads, _whole(config, "num_key_value_heads"))


def write_gguf(
    file: Path,
    kind: str,
    config: Mapping[str, Json],
    tokenizer: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str], Float32],
    name: str,
) -> None:
    """Write `file` with matrices of the type `kind` (of `KINDS`) and all else in float32.

    `config` is that of config.json, `tokenizer` a folder with the tokenizer; `shapes` and `values`
    give the tensors by their names at Hugging Face. One tensor is held in memory at a time.

    Raises:
        UserError: the family, the tokenizer or a tensor cannot be written as GGUF.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize
    from gguf.quants import quant_shape_to_byte_shape

    layout = layout_of(config)
    writer = GGUFWriter(file, layout.architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(KINDS[kind])
    writer.add_quantization_version(2)
    factors = _add_config(writer, config, layout.architecture)
    rows = _whole(config, "vocab_size")
    _add_vocabulary(writer, vocabulary_of(tokenizer, rows))
    named = {theirs: _name(layout, theirs) for theirs in shapes if not _is_tied(theirs, config)}
    types = {theirs: type_of(kind, shapes[theirs]) for theirs in named}
    for theirs, ours in named.items():
        stored = GGMLQuantizationType[types[theirs]]
        byte_shape = shapes[theirs]
        dtype = np.dtype(np.float32 if types[theirs] == "F32" else np.float16)
        if types[theirs] in ("BF16", "Q8_0"):
            byte_shape = quant_shape_to_byte_shape(shapes[theirs], stored)
            dtype = np.dtype(np.uint8)
        size = int(np.prod(byte_shape)) * dtype.itemsize
        writer.add_tensor_info(ours, byte_shape, dtype, size, raw_dtype=stored)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for theirs in named:
            stored = GGMLQuantizationType[types[theirs]]
            writer.write_tensor_data(quantize(layout.to_gguf(theirs, values(theirs)), stored))
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()
    sync(file)


def type_of(kind: str, shape: tuple[int, ...]) -> str:
    """The type of one tensor: vectors stay float32, and rows that no whole blocks fill are F16."""
    if len(shape) < 2:
        return "F32"
    if kind == "Q8_0" and shape[-1] % 32:
        return "F16"
    return kind


def rounded(kind: str, values: Float32) -> Float32:
    """What remains of a tensor's values once they were stored."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    stored = GGMLQuantizationType[type_of(kind, values.shape)]
    return np.asarray(dequantize(quantize(values, stored), stored), np.float32).reshape(
        values.shape
    )


def _is_tied(name: str, config: Mapping[str, Json]) -> bool:
    return name == "lm_head.weight" and config.get("tie_word_embeddings") is True


def _name(layout: Layout, theirs: str) -> str:
    ours = layout.gguf_name(theirs)
    if ours is None:
        raise UserError(
            f"format=gguf: the tensor {theirs} has no place in a model of {layout.architecture}"
        )
    return ours


def _whole(config: Mapping[str, Json], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int):
        raise UserError(f"format=gguf: the model's config says nothing of {name}")
    return value


def _number(value: Json) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _add_config(
    writer: GGUFWriter, config: Mapping[str, Json], architecture: str
) -> Float32 | None:
    """Write what config.json says; returns the factors of positions, if the model has some."""
    head_size = config.get("head_dim")
    heads = _whole(config, "num_attention_heads")
    width = _whole(config, "hidden_size")
    size = head_size if isinstance(head_size, int) else width // heads
    context = _whole(config, "max_position_embeddings")
    window = config.get("sliding_window")
    if config["model_type"] == "mistral" and isinstance(window, int):
        context = min(context, window)  # llama.cpp knows no window here; up to it, all is the same
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(_whole(config, "num_hidden_layers"))
    writer.add_feed_forward_length(_whole(config, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(_whole(config, "num_key_value_heads"))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(_number(config["rms_norm_eps"]))
    writer.add_vocab_size(_whole(config, "vocab_size"))
    if architecture in ("gemma2", "gemma3") and isinstance(window, int):
        writer.add_sliding_window(window)
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if config.get(key) is not None:
            add(_number(config[key]))
    return _add_rope(writer, config, size)


def _add_rope(writer: GGUFWriter, config: Mapping[str, Json], size: int) -> Float32 | None:
    """Write the rotary embedding."""
    from gguf import RopeScalingType

    rope = config.get("rope_parameters")
    assert isinstance(rope, dict)
    inner = rope.get("full_attention")
    sliding = rope.get("sliding_attention")
    whole = inner if isinstance(inner, dict) else rope
    if isinstance(sliding, dict) and _number(sliding["rope_theta"]) != 10_000:
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", _number(sliding["rope_theta"]))
    writer.add_rope_freq_base(_number(whole["rope_theta"]))
    kind = whole.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "llama3":
        return llama3_factors(whole, size)
    if kind not in ("linear", "yarn"):
        raise UserError(
            f"format=gguf: positions of the kind {kind!r}; linear, yarn and llama3 are written"
        )
    writer.add_rope_scaling_type(RopeScalingType(kind))
    writer.add_rope_scaling_factor(_number(whole["factor"]))
    if kind == "yarn":
        original = whole["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(_number(original)))
    return None


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write tokens, merges or scores, special tokens and chat templates."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.rule or "default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_bos_token(vocabulary.adds["bos"])
    writer.add_add_eos_token(vocabulary.adds["eos"])
    writer.add_add_space_prefix(vocabulary.adds["space"])
    for name, at in vocabulary.named.items():
        if name != "eos_token":
            writer.add_uint32(f"tokenizer.ggml.{NAMED[name]}", at)
    for key, at in zip(STOPS, _stops(vocabulary), strict=False):
        writer.add_uint32(f"tokenizer.ggml.{key}", at)
    for name, text in vocabulary.templates.items():
        suffix = "" if name == "default" else f".{name}"
        writer.add_string(f"tokenizer.chat_template{suffix}", text)


def _stops(vocabulary: Vocabulary) -> list[int]:
    """The tokens at which llama.cpp stops, the tokenizer's EOS first."""
    eos = vocabulary.named.get("eos_token")
    stops = [*([] if eos is None else [eos]), *vocabulary.stop_ids]
    found = list(dict.fromkeys(stops))
    if len(found) > len(STOPS):
        raise UserError(
            f"format=gguf: the model stops at {len(found)} tokens, and a GGUF file names at most "
            f"{len(STOPS)}"
        )
    return found
