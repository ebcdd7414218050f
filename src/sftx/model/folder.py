"""A Hugging Face model folder: its configuration, and whether its files are what they must be,
before any is loaded.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig

from sftx.boundary import boundary
from sftx.model_config import check_config, check_links, config_file, model_folder, read_json
from sftx.settings.schema import Model
from sftx.types import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load_config(model: Model) -> PreTrainedConfig:
    """The model's Hugging Face configuration; UserError, with the file, if there is none that sftx
    can use.
    """
    file = config_file(model.path)
    if Path(model.path).is_dir():
        _refuse_adapter(model.path)
        if not file.exists():
            raise UserError(
                f"model.path: {model.path} holds no config.json; a Hugging Face model folder is "
                "needed"
            )
        check_links(Path(model.path))
    check_config(read_json(file), f"model.path: {file}", model.trust_remote_code)
    with boundary(f"model.path: {file} cannot be read as a model"):
        config = AutoConfig.from_pretrained(
            model_folder(model.path), trust_remote_code=model.trust_remote_code
        )
        text = config.get_text_config()
    # A flash kernel that the file names says what its author's machine had; transformers chooses
    # for this one.
    if str(text._attn_implementation).startswith("flash_"):
        config._attn_implementation = None
    return config


def _refuse_adapter(path: str) -> None:
    """A folder with an adapter: transformers would load it, pickled or not, and the base that its
    config names.
    """
    if (Path(path) / "adapter_config.json").exists():
        raise UserError(
            f"model.path: {path} holds an adapter (adapter_config.json); name its base here and "
            "the folder in "
            "adapter.path, or merge the two with `sftx export`"
        )


def check_weights(path: str) -> None:
    """Read the header of every file of weights that loading the model at `path` will read; weights
    stay unread.

    Of a model that is still on the hub, only the index is read.

    Raises:
        UserError: a file is damaged, is not safetensors, or lies outside of the folder; the message names it.
    """
    path = model_folder(path)
    folder = Path(path)
    if not folder.is_dir():
        _names_in_index(path)
        return
    names = [WEIGHTS] if (folder / WEIGHTS).exists() else _names_in_index(path)
    for name in names:
        file = folder / name
        with boundary(
            f"model.path: {file}", "; the file is damaged or missing: copy or download it again"
        ):
            safe_open(file, "pt")


def _names_in_index(path: str) -> list[str]:
    """The names of the files of weights, as the index of a model in several files gives them; []
    without an index.
    """
    file = Path(path) / INDEX
    if not Path(path).is_dir():
        with boundary(f"model.path: {path}: {INDEX} could not be fetched"):
            try:
                file = Path(hf_hub_download(path, INDEX))
            except EntryNotFoundError:
                return []
    if not file.exists():
        return []
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(
            f"model.path: {file}: weight_map must name a file for every weight; the file is damaged"
        )
    for name in names.values():
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(
                f"model.path: {file} names {name!r}; only safetensors files in the same folder "
                "are read"
            )
    return sorted(set(names.values()))
