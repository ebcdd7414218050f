"""Where a model comes from, as the metadata block of its card says it: licence, base and data.

A licence is the one that the user gives, else that of the base. None is made up.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download

from sftx.boundary import boundary
from sftx.data.sources.read import is_hub_name
from sftx.gguf.header import read_header
from sftx.gguf.read import gguf_file, is_gguf
from sftx.settings.schema import Config, Source
from sftx.types import UserError

HUB = "https://huggingface.co"
LARGEST = 1 << 20  # bytes of a card that are read
_FIELD = re.compile(r"^(license(?:_name|_link)?):[ ]*(\S.*?)[ ]*$", re.MULTILINE)
_HUB_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card_fields(config: Config) -> dict[str, str | list[str]]:
    """The fields `license`, `license_name`, `license_link`, `base_model` and `datasets` as far as
    they are known, for run.json and the card.
    """
    fields: dict[str, str | list[str]] = dict(_licence(config))
    base = hub_model(config.model.path)
    if base:
        fields["base_model"] = base
    data = _datasets(config)
    if data:
        fields["datasets"] = data
    return fields


def hub_model(path: str) -> str | None:
    """The model's name, if it is one on the hub: a folder here is nothing that others could find."""
    first, _, _ = path.partition("/")
    is_here = Path(path).exists() or Path(first).exists()
    is_name = bool(_HUB_MODEL.fullmatch(path)) and not path.endswith(".gguf")
    return path if is_name and not is_here else None


def _licence(config: Config) -> dict[str, str]:
    if config.license is None:
        return _of_base(config.model.path)
    if config.license_link is None:
        return {"license": config.license}
    # The hub's way of naming a licence that it has no identifier for.
    return {
        "license": "other",
        "license_name": config.license,
        "license_link": config.license_link,
    }


def _of_base(path: str) -> dict[str, str]:
    """What the base says of its licence: in its card, or in a GGUF file."""
    if is_gguf(path):
        metadata = read_header(gguf_file(path)).metadata
        keys = {"license": "", "license_name": ".name", "license_link": ".link"}
        found: dict[str, str] = {}
        for name, end in keys.items():
            value = metadata.get(f"general.license{end}")
            if isinstance(value, str) and value:
                found[name] = value
    else:
        found = _in_card(_card(path))
    link = found.get("license_link", "https://")
    if not link.startswith(("https://", "http://")):  # a file beside the base's card
        base = hub_model(path)
        if base is None:
            del found["license_link"]
        else:
            found["license_link"] = f"{HUB}/{base}/blob/main/{link}"
    return found if "license" in found else {}


def _card(path: str) -> str:
    """The text of the base's card; empty where it has none, or it cannot be fetched."""
    file = Path(path, "README.md")
    try:
        with boundary("README.md"):
            if hub_model(path):
                file = Path(hf_hub_download(path, "README.md"))
            with file.open("rb") as content:
                return content.read(LARGEST).decode("utf-8", "replace")
    except UserError:
        return ""


def _in_card(card: str) -> dict[str, str]:
    """The licence in the metadata block at the beginning of a card; only texts on one line."""
    block = re.match(r"---\r?\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)
    if not block:
        return {}
    found: dict[str, str] = {}
    for name, quoted in _FIELD.findall(block[1]):
        value = quoted.strip("'\"")
        if not re.search(r"[\[{|>#]", value):
            found[name] = value
    return found


def _datasets(config: Config) -> list[str]:
    """The data sets on the hub that the run trains on, without configuration and split."""
    train = config.data.train
    if not train:
        return []
    entries = train if isinstance(train, list) else [train]
    names: set[str] = set()
    for entry in entries:
        path = entry.path if isinstance(entry, Source) else entry
        if is_hub_name(path):
            without_configuration, _, _ = path.partition(":")
            parts = without_configuration.split("/")
            names.add("/".join(parts[:2]))
    return sorted(names)
