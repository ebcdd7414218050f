"""Damaged and odd model folders: one message with the file and the cause, exit code 2, and no
traceback.
"""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sftx import boundary
from sftx.cli import main
from sftx.types import UserError

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that nothing is wrong with."""
    return Path(tiny.folder(tmp_path_factory.mktemp("sound") / "model"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def refusal(
    folder: Path, capsys: pytest.CaptureFixture[str], verb: str = "train", *more: str
) -> str:
    """The one message with which a command refuses the folder."""
    rows = folder.parent / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "hello", "completion": "there"}) + "\n")
    cache = folder.parent / "cache"
    settings = [
        f"model={folder}",
        f"data.train={rows}",
        f"data.cache={cache}",
        f"output={folder.parent / 'run'}",
    ]
    settings += ["batch.steps=1", "data.workers=0"]
    settings += ["runtime.device=cpu", "runtime.threads=1", "runtime.progress=false"]
    code = main([verb, *settings, *more])
    said = capsys.readouterr().err
    assert code == 2, f"rc {code}: {said}"
    assert said.startswith("error: "), said
    assert "Traceback" not in said
    return said


def config_with(**changes: Any) -> Callable[[Path], None]:
    """A damage: other values in config.json."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


CONFIGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "hidden_size of text": (config_with(hidden_size="abc"), "hidden_size"),
    "hidden_size null": (config_with(hidden_size=None), "hidden_size"),
    "hidden_size of 1e300": (config_with(hidden_size=1e300), "hidden_size"),
    "no heads": (config_with(num_attention_heads=0), ""),
    "heads that do not divide": (config_with(num_attention_heads=7, head_dim=None), ""),
    "odd head_dim": (config_with(head_dim=7), ""),
    "rope_type unknown": (
        config_with(rope_parameters={"rope_type": "curly", "rope_theta": 1e4}),
        "curly",
    ),
    "rope of text": (config_with(rope_parameters="curly"), ""),
    "rope_theta of text": (
        config_with(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
        "",
    ),
    "hidden_act unknown": (config_with(hidden_act="swosh"), "swosh"),
    "dtype unknown": (config_with(dtype="float33", torch_dtype="float33"), "float33"),
    "negative positions": (config_with(max_position_embeddings=-5), "max_position_embeddings"),
    "attention_dropout null": (config_with(attention_dropout=None), "attention_dropout"),
    "attention_dropout of text": (config_with(attention_dropout="abc"), "attention_dropout"),
    "attention_dropout of 7": (config_with(attention_dropout=7), "attention_dropout"),
    "positions of text": (config_with(max_position_embeddings="many"), "max_position_embeddings"),
    "eos_token_id of text": (config_with(eos_token_id="</s>"), "eos_token_id"),
    "vocab_size of text": (config_with(vocab_size="x"), "vocab_size"),
    "vocab_size negative": (config_with(vocab_size=-1), ""),
    "layers of text": (config_with(num_hidden_layers="two"), "num_hidden_layers"),
    "a million layers": (config_with(num_hidden_layers=1_000_000), "num_hidden_layers"),
    "no layers": (config_with(num_hidden_layers=0), "num_hidden_layers"),
    "-1 layers": (config_with(num_hidden_layers=-1), "num_hidden_layers"),
    "model_type unknown": (config_with(model_type="nothing-known"), "nothing-known"),
    "model_type a list": (config_with(model_type=["llama"]), ""),
    "nested deeply": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "x": ' + DEEP + "}"),
        "deep",
    ),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "NULs": (lambda f: (f / "config.json").write_bytes(bytes(300)), "config.json"),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json"),
    "a kernel that is not there": (
        config_with(attn_implementation="kernels-of/nobody"),
        "kernels-of/nobody",
    ),
    "the kernel of sftx": (config_with(attn_implementation="sftx_segments"), "sftx_segments"),
    "a kernel under its inner name": (
        config_with(_attn_implementation="kernels-of/nobody"),
        "kernels-of/nobody",
    ),
    "GPTQ": (
        config_with(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}),
        "",
    ),
    "bitsandbytes": (
        config_with(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "",
    ),
    "quantised by a text": (config_with(quantization_config="yes"), ""),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_config_is_named(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, expected = CONFIGS[name]
    damage(folder)
    began = time.process_time()
    said = refusal(folder, capsys)
    assert time.process_time() - began < 20  # a million layers took 150 s to build
    assert str(folder) in said
    assert expected in said


def header(text: bytes, size: int | None = None, rest: bytes = b"") -> Callable[[Path], Any]:
    """A damage: another header of the weights' file."""

    def damage(folder: Path) -> None:
        length = struct.pack("<Q", len(text) if size is None else size)
        (folder / "model.safetensors").write_bytes(length + text + rest)

    return damage


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _index(names: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        text = (
            names if isinstance(names, str) else json.dumps({"metadata": {}, "weight_map": names})
        )
        (folder / "model.safetensors.index.json").write_text(text)
        torch.save({"model.norm.weight": torch.ones(32)}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")

    return damage


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "cut": (_cut, "model.safetensors"),
    "a length beyond the file": (header(b"{}", size=2**40), "model.safetensors"),
    "not JSON": (header(b"{{{{"), "model.safetensors"),
    "not UTF-8": (header(b'{"\xff\xff": 1}'), "model.safetensors"),
    "a list": (header(b"[1, 2]"), "model.safetensors"),
    "a dtype unknown": (
        header(json.dumps({"x": TENSOR | {"dtype": "F33"}}).encode(), rest=bytes(8)),
        "safetensors",
    ),
    "offsets beyond": (
        header(json.dumps({"x": TENSOR | {"data_offsets": [0, 99]}}).encode(), rest=bytes(8)),
        "safe",
    ),
    "a negative shape": (
        header(json.dumps({"x": TENSOR | {"shape": [-2]}}).encode(), rest=bytes(8)),
        "safetensors",
    ),
    "nested deeply": (header(DEEP.encode()), "model.safetensors"),
    "weights of nothing": (header(b"{}"), "lacks"),
    "a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "safetensors",
    ),
    "no weights at all": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "an index that names a pickle": (
        _index({"model.norm.weight": "pytorch_model.bin"}),
        "pytorch_model.bin",
    ),
    "an index that leads out": (
        _index({"model.norm.weight": "../x/model.safetensors"}),
        "../x/model.safetensors",
    ),
    "an index of a file not there": (
        _index({"model.norm.weight": "gone.safetensors"}),
        "gone.safetensors",
    ),
    "an index of numbers": (_index({"model.norm.weight": 7}), "index.json"),
    "an index that is a list": (_index("[]"), "index.json"),
    "an index that is not JSON": (_index("{"), "index.json"),
    "an index without a map": (_index('{"weight_map": 3}'), "index.json"),
    "an adapter in the folder": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "adapter.path",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights_are_named(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, expected = WEIGHTS[name]
    damage(folder)
    said = refusal(folder, capsys)
    assert str(folder) in said
    assert expected in said


def tokenizer_with(name: str = "tokenizer_config.json", **changes: Any) -> Callable[[Path], None]:
    """A damage: other values in a file of the tokenizer."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(
            json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes)
        )

    return damage


def _template(value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer_with(chat_template=value)(folder)

    return damage


TOKENIZERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nested deeply": (
        lambda f: (f / "tokenizer_config.json").write_text('{"x": ' + DEEP + "}"),
        "tokenizer_config",
    ),
    "a list": (lambda f: (f / "tokenizer_config.json").write_text("[1]"), "tokenizer_config.json"),
    "added tokens a list": (tokenizer_with(added_tokens_decoder=[1]), "tokenizer_config.json"),
    "added tokens by name": (
        tokenizer_with(added_tokens_decoder={"x": {"content": "y"}}),
        "tokenizer_config.json",
    ),
    "an added token of numbers": (
        tokenizer_with(added_tokens_decoder={"9": 3}),
        "tokenizer_config.json",
    ),
    "eos_token a number": (tokenizer_with(eos_token=7), "tokenizer_config.json"),
    "eos_token a list": (tokenizer_with(eos_token=["</s>"]), "tokenizer_config.json"),
    "template a number": (_template(7), "tokenizer_config.json"),
    "template an object": (_template({"default": "x"}), "tokenizer_config.json"),
    "templates without names": (_template([{"template": "x"}]), "tokenizer_config.json"),
    "a template of numbers": (
        _template([{"name": "default", "template": 7}]),
        "tokenizer_config.json",
    ),
    "chat_template.json a list": (
        lambda f: (f / "chat_template.json").write_text("[1]"),
        "chat_template.json",
    ),
    "template not UTF-8": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"),
        "chat_template.jinja",
    ),
    "tokenizer.json empty": (lambda f: (f / "tokenizer.json").write_text(""), "tokenizer.json"),
    "tokenizer.json a list": (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json"),
    "tokenizer.json deep": (lambda f: (f / "tokenizer.json").write_text(DEEP), "tokenizer.json"),
    "a vocabulary of text": (
        tokenizer_with("tokenizer.json", model={"type": "BPE", "vocab": "x"}),
        "tokenizer.json",
    ),
    "a longest text of text": (tokenizer_with(model_max_length="abc"), "model.tokenizer"),
    "a longest text of nothing": (tokenizer_with(model_max_length={}), "model.tokenizer"),
    "attentions asked for": (
        tokenizer_with("generation_config.json", output_attentions=True),
        "generation_config.json",
    ),
    "stop ids of text": (
        tokenizer_with("generation_config.json", eos_token_id="</s>"),
        "generation_config.json",
    ),
    "stop ids nested": (
        tokenizer_with("generation_config.json", eos_token_id=[[2]]),
        "generation_config.json",
    ),
    "generation a list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        "generation_config.json",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokenizer_is_named(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, expected = TOKENIZERS[name]
    damage(folder)
    said = refusal(folder, capsys)
    assert str(folder) in said
    assert expected in said


@pytest.mark.parametrize(
    "name", ["a million layers", "no layers", "positions of text", "hidden_act unknown", "not JSON"]
)
def test_plan_refuses_it_too(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = CONFIGS[name]
    damage(folder)
    assert expected in refusal(folder, capsys, "plan")


@pytest.mark.parametrize(
    "name", ["positions of text", "negative positions", "a list", "nested deeply"]
)
def test_inspect_refuses_it_too(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CONFIGS[name][0](folder)
    assert "config.json" in refusal(folder, capsys, "inspect")


def test_the_boundary_turns_errors_of_libraries_and_lets_others_pass() -> None:
    class PanicException(BaseException):
        """As Rust code raises it."""

    for error in (
        KeyError("x"),
        ZeroDivisionError(),
        RecursionError(),
        PanicException("index out of range"),
    ):
        with (
            pytest.raises(UserError, match=r"^file\.json: ") as caught,
            boundary.boundary("file.json"),
        ):
            raise error
        assert caught.value.__cause__ is error
    for passing in (
        KeyboardInterrupt(),
        SystemExit(3),
        MemoryError(),
        OSError(28, "no space left"),
        UserError("mine"),
    ):
        with pytest.raises(type(passing)) as passed, boundary.boundary("file.json"):
            raise passing
        assert passed.value is passing
