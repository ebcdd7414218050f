"""What the verbs that look at data need of a model: its tokenizer and its longest example, without loading it."""

from __future__ import annotations

from pathlib import Path

from sftx.config import Config
from sftx.data.encode import DEFAULT_LENGTH
from sftx.data.tokenizer import Tokenizer, read_json
from sftx.types import UserError


def tokenizer_and_length(config: Config) -> tuple[Tokenizer, int]:
    """The tokenizer, and `data.max_length` or what a run would take in its place."""
    tokenizer = Tokenizer.of_model(config.model)
    return tokenizer, config.data.max_length or min(_positions(config.model.path), DEFAULT_LENGTH)


def _positions(path: str) -> int:
    """The positions of the model at `path`; as many as wanted where only a tokenizer is there."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(path, "config.json"))
        except (OSError, ValueError) as error:  # the hub's and the network's errors derive from these
            raise UserError(f"{path}: neither a folder here nor a model that could be fetched ({error})") from None
    config = read_json(file)
    inner = config.get("text_config") or config
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")
    return next((int(inner[name]) for name in names if inner.get(name)), DEFAULT_LENGTH)


def whole_number(key: str, value: str, least: int = 1) -> int:
    """The number that a verb's own `key` was given; UserError if it is none, or less than `least`."""
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"sftx {key}={value!r}: expected a whole number of at least {least}")
    return int(value)
