"""The tensors of a GGUF file as Hugging Face names and lays them out, and back.

llama.cpp differs in three things: names; in Llama, the order of the rows of the query and key
projections (its rotary embedding turns neighbours, Hugging Face's turns halves); in Gemma, norms,
which are stored with 1 added.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}
_TWO_NORMS = {"ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_IN_LAYER = {
    "llama": _LINEAR | _TWO_NORMS,
    "qwen2": _LINEAR | _TWO_NORMS,
    "qwen3": _LINEAR | _TWO_NORMS | _HEAD_NORMS,
    "gemma": _LINEAR | _TWO_NORMS,
    "gemma2": _LINEAR | _FOUR_NORMS,
    "gemma3": _LINEAR | _FOUR_NORMS | _HEAD_NORMS,
}
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor in which llama.cpp keeps what Llama 3.1 divides its frequencies by."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the tensors of one model differ between the two."""

    architecture: str
    heads: int
    key_heads: int

    def in_layer(self) -> list[str]:
        """What each layer has, by its name at Hugging Face."""
        return list(_IN_LAYER[self.architecture].values())

    def hugging_face_name(self, name: str) -> str | None:
        """The name there of the tensor called `name` in GGUF; None if the family has no such one."""
        stem, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        if stem in _TOP:
            return f"{_TOP[stem]}.{kind}"
        found = re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.(\w+)", stem)
        inner = _IN_LAYER[self.architecture].get(found[2]) if found else None
        return f"model.layers.{found[1]}.{inner}.{kind}" if found and inner else None

    def gguf_name(self, name: str) -> str | None:
        """The name in GGUF of the tensor called `name` by Hugging Face; None if there is none."""
        stem, _, kind = name.rpartition(".")
        top = {theirs: ours for ours, theirs in _TOP.items()}
        if stem in top:
            return f"{top[stem]}.{kind}"
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        in_layer = {theirs: ours for ours, theirs in _IN_LAYER[self.architecture].items()}
        inner = in_layer.get(found[2]) if found else None
        return f"blk.{found[1]}.{inner}.{kind}" if found and inner else None

    def from_gguf(self, name: str, values: Float32) -> Float32:
        """Values as GGUF stores them, in the order and with the offset of Hugging Face; `name` is
        that of Hugging Face.
        """
        if self._adds_one(name):
            return values - np.float32(1)
        heads = self._interleaved(name)
        if not heads:
            return values
        halves = len(values) // heads // 2
        pairs = values.reshape(heads, halves, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def to_gguf(self, name: str, values: Float32) -> Float32:
        """The reverse of `from_gguf`."""
        if self._adds_one(name):
            return values + np.float32(1)
        heads = self._interleaved(name)
        if not heads:
            return values
        halves = len(values) // heads // 2
        pairs = values.reshape(heads, 2, halves, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def _adds_one(self, name: str) -> bool:
        return self.architecture.startswith("gemma") and name.endswith("norm.weight")

    def _interleaved(self, name: str) -> int:
        """How many heads the rows of a tensor belong to, where llama.cpp orders them otherwise."""
        if self.architecture != "llama":
            return 0
        if ".q_proj." in name:
            return self.heads
        return self.key_heads if ".k_proj." in name else 0
