"""The config.json that belongs to a GGUF file's metadata, and the metadata that belong to a config.

Families: Llama (and Mistral, which llama.cpp writes as Llama), Qwen2, Qwen3, Gemma 1 to 3. A key of
the family that is not known here is refused: left out, it could change what the model computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftx.gguf.header import Header, Scalar
from sftx.types import Json, UserError

CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
"""model_type and class of each architecture that GGUF names."""
ARCHITECTURES = {model_type: name for name, (model_type, _) in CLASSES.items()}
ARCHITECTURES["mistral"] = "llama"
_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_KNOWN = {
    *_SIZES,
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "expert_count",
    "expert_used_count",
}
_KNOWN_IN_GEMMA = {"attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base_swa"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""llama.cpp tells the two models that scale attention otherwise by their number of layers."""
_SLIDING_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata of a file, read with the type that each must have."""

    header: Header

    @property
    def architecture(self) -> str:
        """The family; UserError where it is not covered."""
        name = self.header.metadata.get("general.architecture")
        if name not in CLASSES:
            known = ", ".join(CLASSES)
            raise UserError(
                f"{self.header.path}: a GGUF file of the family {name!r}; sftx reads {known}"
            )
        return str(name)

    @property
    def is_gemma(self) -> bool:
        """Whether it is Gemma 2 or 3: soft caps, and layers that see a window."""
        return self.architecture in ("gemma2", "gemma3")

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the family's own keys."""
        value = self._of_family(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        if not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._of_family(key, default)
        if isinstance(value, list) and len(set(value)) == 1:  # one for each layer, all alike
            value = value[0]
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a whole number of at least 1")
        return value

    def text(self, key: str) -> str | None:
        """A text of the family's own keys."""
        value = self.header.metadata.get(f"{self.architecture}.{key}")
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def has(self, key: str) -> bool:
        """Whether the family's key stands there."""
        return f"{self.architecture}.{key}" in self.header.metadata

    def check_keys(self) -> None:
        """UserError for a key of the family that is not known here."""
        prefix = f"{self.architecture}."
        for key, value in self.header.metadata.items():
            if not key.startswith(prefix):
                continue
            name = key.removeprefix(prefix)
            known = name in _KNOWN or (name in _KNOWN_IN_GEMMA and self.is_gemma)
            if not known or (name.startswith("expert_") and value != 0):
                raise UserError(
                    f"{self.header.path}: {key} is {str(value)[:40]}; sftx does not read models of "
                    "that kind from GGUF. Take the Hugging Face folder of the model instead"
                )

    def _of_family(self, key: str, default: Scalar | None) -> object:
        value = self.header.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise UserError(
                f"{self.header.path}: {self.architecture}.{key} is missing; the file is damaged"
            )
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> UserError:
        found = str(value)[:40]
        return UserError(
            f"{self.header.path}: {self.architecture}.{key} is {found}; {wanted} is needed"
        )


def config_of(header: Header, rope_factors: NDArray[np.float32] | None) -> dict[str, Json]:
    """The config.json of a GGUF file, without the ids of special tokens.

    `rope_factors`: the contents of rope_freqs.weight, if the file has it.

    Raises:
        UserError: the family is not covered, a key is missing, wrong or not known.
    """
    told = Metadata(header)
    architecture = told.architecture
    told.check_keys()
    model_type, class_name = CLASSES[architecture]
    config: dict[str, Json] = {"model_type": model_type, "architectures": [class_name]}
    config |= {theirs: told.count(ours) for ours, theirs in _SIZES.items()}
    if told.has("attention.sliding_window") and not told.is_gemma:
        # llama.cpp knows no window here, Mistral has one: up to it, both compute the same.
        window = told.count("attention.sliding_window")
        config["max_position_embeddings"] = min(told.count("context_length"), window)
    heads = told.count("attention.head_count")
    config["num_key_value_heads"] = told.count("attention.head_count_kv", heads)
    config["head_dim"] = _head_size(told, heads)
    config["rms_norm_eps"] = _rounded(told.number("attention.layer_norm_rms_epsilon"))
    config["vocab_size"] = _rows(header, "token_embd.weight")
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if architecture == "qwen3":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    rope = _rope(told, rope_factors)
    config["rope_parameters"] = rope
    if told.is_gemma:
        config |= _gemma(told, architecture, rope)
    return config


def _head_size(told: Metadata, heads: int) -> int:
    width = told.count("embedding_length")
    turned = told.count("rope.dimension_count", max(width // heads, 1))
    size = told.count("attention.key_length", turned)
    for key in ("attention.value_length", "rope.dimension_count"):
        if told.count(key, size) != size:
            raise UserError(
                f"{told.header.path}: heads of {size} values, and {key} is {told.count(key)}; sftx "
                "reads models whose queries, values and turned positions are equally wide"
            )
    return size


def _rows(header: Header, name: str) -> int:
    if name not in header.tensors:
        raise UserError(f"{header.path}: the tensor {name} is missing; the file is damaged")
    return header.tensors[name].shape[0]


def _rounded(value: float) -> float:
    """The shortest number that is the same in float32: 1e-05 where the file says 9.9999997e-06."""
    return float(str(np.float32(value)))


def _rope(told: Metadata, factors: NDArray[np.float32] | None) -> dict[str, Json]:
    """The rotary embedding; UserError for a scaling that is not covered."""
    theta = _rounded(told.number("rope.freq_base", 10_000.0))
    rope: dict[str, Json] = {"rope_type": "default", "rope_theta": theta}
    if factors is not None:
        return rope | _llama3(told, theta, factors)
    kind = told.text("rope.scaling.type")
    if kind is None and told.has("rope.scaling.factor"):
        kind = "linear"  # as llama.cpp takes it
    if kind in (None, "none"):
        return rope
    factor = _rounded(told.number("rope.scaling.factor"))
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = told.count("rope.scaling.original_context_length")
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise UserError(
        f"{told.header.path}: rope.scaling.type is {kind!r}; linear, yarn and none are read"
    )


def _llama3(told: Metadata, theta: float, factors: NDArray[np.float32]) -> dict[str, Json]:
    """The scaling of Llama 3.1 whose factors these are: a file does not name its parameters, and all
    published models share all but one.
    """
    rope: dict[str, Json] = {
        "rope_type": "llama3",
        "factor": _rounded(float(factors.max(initial=1))),
        "low_freq_factor": _LLAMA3["low_freq_factor"],
        "high_freq_factor": _LLAMA3["high_freq_factor"],
        "original_max_position_embeddings": int(_LLAMA3["original"]),
    }
    size = _head_size(told, told.count("attention.head_count"))
    expected = llama3_factors({"rope_theta": theta, **rope}, size)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5):
        raise UserError(
            f"{told.header.path}: the factors of positions in rope_freqs.weight are not those of "
            "Llama 3.1 to 3.3; sftx reads no others"
        )
    return rope


def llama3_factors(rope: dict[str, Json], head_size: int) -> NDArray[np.float32]:
    """What each frequency is divided by, float32[head_size / 2]."""
    theta, factor, low, high, original = (
        float(str(rope[name]))
        for name in (
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    lengths = 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    smooth = (original / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(lengths > original / low, factor, between)
    return np.where(lengths < original / high, 1.0, factors).astype(np.float32)


def _gemma(told: Metadata, architecture: str, rope: dict[str, Json]) -> dict[str, Json]:
    """What Gemma 2 and 3 have beside the others."""
    head_size = _head_size(told, told.count("attention.head_count"))
    scale = head_size
    if told.count("block_count") == _LAYERS_OF_27B[architecture]:
        scale = told.count("embedding_length") // told.count("attention.head_count")
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    config: dict[str, Json] = {
        "query_pre_attn_scalar": scale,
        "sliding_window": told.count("attention.sliding_window", 4096),
    }
    for name, default in caps.items():
        if architecture == "gemma2" or told.has(name):
            config[name] = told.number(name, default)
        else:
            config[name] = None
    if architecture == "gemma3":
        sliding = told.number("rope.freq_base_swa", _SLIDING_THETA)
        config["rope_parameters"] = {
            "full_attention": dict(rope),
            "sliding_attention": {"rope_type": "default", "rope_theta": _rounded(sliding)},
        }
    every = 2 if architecture == "gemma2" else 6  # so many layers, of which the last sees all
    config["layer_types"] = [
        "full_attention" if number % every == every - 1 else "sliding_attention"
        for number in range(told.count("block_count"))
    ]
    return config
