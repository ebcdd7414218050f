"""The commands of real servers for a model's folder."""

from __future__ import annotations

import shlex
from pathlib import Path

from sftx.model_config import read_json

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


def commands(path: str) -> list[str]:
    """Lines to show: how vLLM, SGLang and llama.cpp serve the model, or the adapter, at `path`."""
    config = read_json(Path(path) / "adapter_config.json")
    if config:
        return _of_adapter(path, config)
    name = shlex.quote(path)
    return [
        "to serve it to many:",
        f"  vllm serve {name}",
        f"  python -m sglang.launch_server --model-path {name}",
        *_by_llama_cpp(path),
    ]


def _of_adapter(path: str, config: dict[str, object]) -> list[str]:
    base = shlex.quote(str(config.get("base_model_name_or_path", "BASE")))
    name = shlex.quote(path)
    if config.get("use_dora") or config.get("trainable_token_indices"):
        return [
            "to serve it to many, write it as one model first (servers do not load such an "
            f"adapter): sftx export {name} to=merged",
            "  vllm serve merged",
        ]
    return [
        "to serve it to many:",
        f"  vllm serve {base} --enable-lora --max-lora-rank {_rank(config)} --lora-modules tuned={name}",
        f"  python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths tuned={name}",
        *_by_llama_cpp(path),
    ]


def _rank(config: dict[str, object]) -> int:
    """The smallest rank that vLLM allows and that holds the adapter's."""
    rank = config.get("r")
    rank = rank if isinstance(rank, int) else 16
    return next((allowed for allowed in _RANKS if allowed >= rank), _RANKS[-1])


def _by_llama_cpp(path: str) -> list[str]:
    if path.endswith(".gguf"):
        return [f"  llama-server -m {shlex.quote(path)} --jinja"]
    name = shlex.quote(path)
    return [f"  sftx export {name} to=model.gguf format=gguf && llama-server -m model.gguf --jinja"]
