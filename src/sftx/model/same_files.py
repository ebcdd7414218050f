"""Which model a folder holds: a digest by which a run knows its base again.

An adapter, frozen weights and what config.json says are no part of a checkpoint. Another model under
the same name would be continued or merged as if nothing had changed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from sftx.boundary import boundary
from sftx.model_config import check_links, config_file, read_json

SAMPLE = 1024
"""Bytes that are read at the begin and at the end of each tensor: training changes some of them, and
a large model is not read a second time.
"""
_NO_MATTER = ("transformers_version", "_name_or_path")


def digest_of(path: str) -> str:
    """32 hex digits of a hash of the configuration, and of the name, kind, shape and some contents
    of every tensor, of the model at `path`: a folder, a GGUF file, or a name on the hub whose files
    are here.

    How the tensors are spread over files does not matter.

    Raises:
        UserError: a file is damaged, or leads out of the folder.
    """
    file = config_file(path)
    check_links(file.parent)  # a stranger's file may be a pipe, which would be waited for
    config = read_json(file)
    for name in _NO_MATTER:
        config.pop(name, None)
    tensors: dict[str, str] = {}
    for weights in sorted(file.parent.glob("*.safetensors")):
        if not weights.is_file():
            continue
        with boundary(weights, "; the file is damaged: copy or download it again"):
            tensors |= _tensors_of(weights)
    text = json.dumps([config, tensors], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _tensors_of(file: Path) -> dict[str, str]:
    """For each tensor in a file of safetensors, by its name: its kind, shape and sample, in hash."""
    found: dict[str, str] = {}
    with file.open("rb") as content:
        size = min(int.from_bytes(content.read(8), "little"), file.stat().st_size)
        header = json.loads(content.read(size))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            about = f"{tensor['dtype']} {tensor['shape']} "
            state = hashlib.sha256(about.encode())
            state.update(_sample(content, 8 + size + begin, 8 + size + end))
            found[name] = state.hexdigest()
    return found


def _sample(content: BinaryIO, begin: int, end: int) -> bytes:
    """The first and the last bytes of a stretch of a file."""
    content.seek(begin)
    first = content.read(min(SAMPLE, end - begin))
    content.seek(max(begin, end - SAMPLE))
    return first + content.read(min(SAMPLE, end - begin))
