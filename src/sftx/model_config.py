"""The config.json of a model, read as JSON and checked for what a library would choke on, hang at,
or run code for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sftx.boundary import boundary
from sftx.hub import ask_hub
from sftx.types import UserError

MOST = 10_000
"""Layers, blocks or experts of a model: more are not built. The largest published models have a few
hundred.
"""
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")
_COUNT = re.compile(r"(n|num)_(\w+_)?(layers?|blocks?|experts?)")
_DROPOUT = re.compile(r"(\w+_)?(dropout|pdrop)(_prob|_rate|_p)?")
# The files of a folder that are read as text, and whose content may come into what is saved.
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Named by a file, any other kernel could be code of the hub. `flash_*` only says what the model's
# author used.
_KERNELS = {
    "attn_implementation": (
        "eager",
        "sdpa",
        "flex_attention",
        "flash_attention_2",
        "flash_attention_3",
    ),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder; {} if the file is not there.

    Raises:
        UserError: it is not JSON, or no object; the message names the file.
    """
    if not path.exists():
        return {}
    again = "; the file is damaged: copy or download it again"
    with boundary(f"{path}: not JSON", again):
        value = json.loads(path.read_bytes().decode("utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is needed, found {str(value)[:40]}{again}")
    return value


def check_links(folder: Path) -> None:
    """Refuse a model's folder of which a text file leads out to a file that belongs to no model, or
    is no file at all. A trained model is saved with such texts (its chat template, say): a folder
    of a stranger could have a private file saved, and published, with them.

    Links into the hub's cache and into other models' folders are in use, and so are links of
    weights, which are never copied as they are.

    Raises:
        UserError: naming the file, and where it leads.
    """
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    for path in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]:
        if path.suffix not in _TEXTS:
            continue
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise UserError(f"{path}: not a file that can be read; copy or download it again")
        inside = target.is_relative_to(root)
        if not inside and not any(target.parent.glob("*.safetensors")):
            raise UserError(
                f"{path}: a link to {target}, outside of the folder; if you want that file there, "
                "copy it"
            )


def model_folder(path: str) -> str:
    """`path`, or the Hugging Face folder that a GGUF file there is converted into."""
    return import_module("sftx.gguf.read").model_folder(path)  # not on every reader's way


def config_file(path: str) -> Path:
    """The config.json of the model at `path`: a folder, a GGUF file, that file itself, or a name on
    the hub, which is fetched.
    """
    path = model_folder(path)
    if Path(path).is_dir():
        return Path(path) / "config.json"
    if Path(path).is_file():
        return Path(path)
    from huggingface_hub import hf_hub_download

    ask_hub(path)
    with boundary(f"{path}: neither a folder here nor a model that could be fetched"):
        return Path(hf_hub_download(path, "config.json"))


def check_config(config: dict[str, Any], place: object, trusted: bool = False) -> None:
    """Refuse counts that nobody can build, positions that are none, and kernels that a file may not
    name.

    `trusted`: the caller lets code that comes with the model run, kernels of the hub too.

    Raises:
        UserError: naming `place`, the field, and what is allowed.
    """
    for inner in (config, config.get("text_config")):
        if isinstance(inner, dict):
            _check_sizes(inner, place)
    for name, value in _entries(config):
        if type(value) in (int, float) and value > MOST and _COUNT.fullmatch(name):
            raise UserError(f"{place}: {name}: found {value:,}; more than {MOST:,} are not built")
        if _DROPOUT.fullmatch(name):
            _check_rate(name, value, place)
        known = _KERNELS.get(name.removeprefix("_").removesuffix("_internal"))
        if known is not None:
            _check_kernel(name, value, known, place, trusted)


def _check_sizes(config: dict[str, Any], place: object) -> None:
    """A model has at least one position and one layer."""
    for name in POSITIONS:
        value = config.get(name)
        if value is not None and not (type(value) is int and value >= 1):
            raise UserError(
                f"{place}: {name}: found {value!r}; a whole number of at least 1 is needed"
            )
    for name in _LAYERS:
        value = config.get(name)
        if isinstance(value, int | float) and value < 1:
            raise UserError(f"{place}: {name}: found {value!r}; a model has at least one layer")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            yield from inner.items()
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner


def _check_rate(name: str, value: Any, place: object) -> None:
    """A rate of dropout; where there is no number, only that of attention is multiplied with all
    the same.
    """
    if value is None and name != "attention_dropout":
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{place}: {name}: found {value!r}; a number from 0 to 1 is needed")


def _check_kernel(
    name: str, value: Any, known: tuple[str, ...], place: object, trusted: bool
) -> None:
    for kernel in value.values() if isinstance(value, dict) else [value]:
        allowed = kernel is None or kernel in known
        if not allowed and not (trusted and isinstance(kernel, str) and "/" in kernel):
            raise UserError(
                f"{place}: {name}: found {kernel!r}; a file may name one of {', '.join(known)}, "
                "or leave the choice to "
                "sftx: take the line out"
            )


def positions(path: str, default: int) -> int:
    """How many positions the model at `path` has; `default` where its config does not say."""
    file = config_file(path)
    config = read_json(file)
    check_config(config, file)
    return positions_in(config) or default


def positions_in(config: Mapping[str, Any]) -> int | None:
    """How many positions a config (or the text model in it) names; None where it sets no limit."""
    inner = config.get("text_config") or config
    return next((int(inner[name]) for name in POSITIONS if inner.get(name)), None)
