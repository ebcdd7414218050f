"""A GGUF file as a Hugging Face folder: made once, in sftx's cache, named by the contents of the file.

Everything that reads a model folder goes on from there. Values are stored as they are where they are
floats, and in float32 where they were quantised.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from sftx.boundary import boundary
from sftx.files import sync, write_json
from sftx.gguf.config import config_of
from sftx.gguf.header import Header, TensorEntry, read_header
from sftx.gguf.tensors import ROPE_FACTORS, Layout
from sftx.gguf.vocabulary import read_vocabulary, tokenizer_files
from sftx.types import Json, UserError

VERSION = "1"
"""Raise it when the same file must be converted anew."""
_FLOATS = {0: ("float32", "F32"), 1: ("float16", "F16"), 30: ("bfloat16", "BF16")}
"""The ggml types that hold numbers as they are: their name in a config, and in safetensors."""
_DONE = "gguf.json"
"""The file that a folder gets last: what it was made from."""


def gguf_file(path: str) -> Path:
    """The one GGUF file that `path` names: the file, or a folder that holds it.

    Raises:
        UserError: the folder holds several, or a part of a model in several files.
    """
    found = [Path(path)]
    if Path(path).is_dir():
        found = sorted(Path(path).glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise UserError(f"{path}: holds {len(found)} GGUF files ({names}); name one of them")
    [file] = found
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    return file


def is_gguf(path: str) -> bool:
    """Whether `path` is a GGUF file, or a folder that holds one and no Hugging Face model."""
    folder = Path(path)
    if not folder.is_dir():
        return path.endswith(".gguf")
    return not (folder / "config.json").exists() and any(folder.glob("*.gguf"))


def model_folder(path: str) -> str:
    """`path`, or the folder that the GGUF file there is converted into."""
    if is_gguf(path):
        return converted_folder(path)
    return path


def converted_folder(path: str) -> str:
    """The Hugging Face folder of the GGUF file at `path`, converted now or found in the cache.

    Raises:
        UserError: the package gguf is missing; the file is damaged, or of a kind that is not covered.
    """
    file = gguf_file(path)
    state = file.stat()
    return _converted(file.resolve(), state.st_size, state.st_mtime_ns)


def source_of(path: str) -> dict[str, str] | None:
    """What run.json says of the GGUF file at `path`: its name and the hash of its contents; None
    where `path` is none.
    """
    if not is_gguf(path):
        return None
    told = json.loads((Path(converted_folder(path)) / _DONE).read_text(encoding="utf-8"))
    return {"file": gguf_file(path).name, "sha256": told["sha256"]}


@lru_cache(8)
def _converted(file: Path, size: int, changed: int) -> str:
    """The folder for the file of this size, changed at that time."""
    if find_spec("gguf") is None:
        raise UserError(f"{file}: reading GGUF needs the package gguf; pip install 'sftx[gguf]'")
    header = read_header(file)  # what is no such file is not read to its end
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    cache = Path(os.environ.get("SFTX_CACHE") or "~/.cache/sftx").expanduser() / "gguf"
    target = cache / f"{digest[:32]}-{VERSION}"
    if (target / _DONE).is_file():
        return str(target)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{target.name}.lock"):  # several ranks, one conversion
            if not (target / _DONE).is_file():
                _convert(header, digest, target)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be converted in {cache} ({error}); set SFTX_CACHE to a folder with "
            "room for it"
        ) from error
    return str(target)


def _convert(header: Header, digest: str, target: Path) -> None:
    """Write the folder beside `target`, and move it there whole."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_folder(header, temporary)
        write_json(temporary / _DONE, {"file": header.path.name, "sha256": digest})
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(header: Header, folder: Path) -> None:
    """Write config.json, tokenizer, chat templates and weights of a GGUF file into `folder`.

    Raises:
        UserError: the file is damaged, or of a kind that is not covered.
    """
    entry = header.tensors.get(ROPE_FACTORS)
    with boundary(f"{header.path}: this GGUF file cannot be read"):
        factors = None if entry is None else _read(header, entry)
        config = config_of(header, factors)
        vocabulary = read_vocabulary(header)
        _check_rows(header, config, len(vocabulary.tokens))
        files = tokenizer_files(vocabulary, header.path)
        config |= json.loads(files["generation_config.json"])
        config["dtype"] = _dtype(header)
        for name, text in files.items():
            place = folder / name
            place.parent.mkdir(exist_ok=True)
            place.write_text(text, encoding="utf-8")
            sync(place)
        _write_weights(header, config, folder)
    write_json(folder / "config.json", config)


def _check_rows(header: Header, config: dict[str, Json], tokens: int) -> None:
    rows = config["vocab_size"]
    assert isinstance(rows, int)
    if tokens > rows:
        raise UserError(
            f"{header.path}: {tokens:,} tokens, and embeddings of {rows:,}; the file is damaged"
        )


def _dtype(header: Header) -> Json:
    """The dtype in which the matrices are stored; float32 where one is quantised."""
    kinds = {entry.kind for entry in header.tensors.values() if len(entry.shape) > 1}
    [kind, *others] = kinds or {0}
    if others or kind not in _FLOATS:
        return "float32"
    return _FLOATS[kind][0]


def _write_weights(header: Header, config: dict[str, Json], folder: Path) -> None:
    """Write all tensors into model.safetensors, one after another: only one is held in memory.

    The format: the length of the header (8 bytes), the header as JSON, the tensors.
    """
    layout = Layout(
        str(header.metadata["general.architecture"]),
        _whole(config["num_attention_heads"]),
        _whole(config["num_key_value_heads"]),
    )
    names = _names(header, layout, config)
    table: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in names.items():
        begin = end
        dtype = _stored_as(entry)
        end += prod(entry.shape) * (4 if dtype == "F32" else 2)
        shape = [int(size) for size in entry.shape]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    written = json.dumps(table).encode()
    written += b" " * (-len(written) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little"))
        file.write(written)
        for name, entry in names.items():
            file.write(_content(header, layout, name, entry))
    sync(folder / "model.safetensors")


def _whole(value: Json) -> int:
    assert isinstance(value, int)
    return value


def _names(header: Header, layout: Layout, config: dict[str, Json]) -> dict[str, TensorEntry]:
    """Every tensor by its name at Hugging Face.

    Raises:
        UserError: a tensor is unknown or missing, or its shape is not that of the config.
    """
    found: dict[str, TensorEntry] = {}
    for name, entry in header.tensors.items():
        if name == ROPE_FACTORS:
            continue
        theirs = layout.hugging_face_name(name)
        if theirs is None:
            raise UserError(
                f"{header.path}: the tensor {name} belongs to no model of the family "
                f"{layout.architecture} that sftx reads"
            )
        found[theirs] = entry
    missing = [name for name in _expected(layout, config) if name not in found]
    if missing:
        raise UserError(
            f"{header.path}: {len(missing)} tensors are missing (first: {missing[0]}); the file is "
            "damaged"
        )
    return found


def _expected(layout: Layout, config: dict[str, Json]) -> Iterator[str]:
    """The weights that every model of the family has; biases are left out."""
    yield "model.embed_tokens.weight"
    yield "model.norm.weight"
    for number in range(_whole(config["num_hidden_layers"])):
        for name in layout.in_layer():
            yield f"model.layers.{number}.{name}.weight"


def _read(header: Header, entry: TensorEntry) -> NDArray[np.float32]:
    """The values of a tensor, float32 in its shape."""
    from gguf import GGMLQuantizationType, dequantize

    raw = np.memmap(header.path, np.uint8, "r", entry.start, (entry.size,))
    kind = GGMLQuantizationType(entry.kind)
    try:
        values = dequantize(raw.reshape(*entry.shape[:-1], -1), kind)
    except NotImplementedError:
        raise UserError(
            f"{header.path}: the tensor {entry.name} is of the type {kind.name}, which cannot be "
            "read as numbers"
        ) from None
    return np.ascontiguousarray(values, np.float32).reshape(entry.shape)


def _stored_as(entry: TensorEntry) -> str:
    """The dtype by safetensors' name: floats keep their own, others become float32."""
    if entry.kind in _FLOATS:
        return _FLOATS[entry.kind][1]
    return "F32"


def _content(header: Header, layout: Layout, name: str, entry: TensorEntry) -> bytes:
    """The bytes of a tensor as Hugging Face lays it out."""
    values = layout.from_gguf(name, _read(header, entry))
    if not np.isfinite(values).all():
        raise UserError(
            f"{header.path}: the tensor {entry.name} holds numbers that are not finite; the file "
            "is damaged"
        )
    values = np.ascontiguousarray(values)
    dtype = _stored_as(entry)
    if dtype == "F16":
        return values.astype(np.float16).tobytes()
    if dtype == "BF16":  # exact: the values came from bfloat16
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.tobytes()
