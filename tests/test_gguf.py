"""GGUF: what is read from a file is what was written into it, and what it was made from."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import sftx
from sftx.cli import main
from sftx.gguf.config import config_of
from sftx.gguf.header import read_header
from sftx.gguf.pieces import ids_of_pieces
from sftx.gguf.read import write_folder
from sftx.gguf.vocabulary import read_vocabulary
from sftx.types import UserError

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "tokenizers"
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, untied, with biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3, wide heads": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", GEMMA | {"num_hidden_layers": 7}),
}
IDS = torch.randint(8, 299, (1, 40), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def read(file: Path, folder: Path) -> Path:
    folder.mkdir()
    write_folder(read_header(file), folder)
    return folder


def small(tmp_path: Path, kind: str = "F16", **changes: Any) -> Path:
    """A GGUF file of a small Llama."""
    source = gguf_files.folder(tmp_path / "hf", **changes)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return gguf_files.gguf_of(source, model, tmp_path / "small.gguf", kind)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_round_trip_gives_the_logits_of_the_rounded_weights(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    source = gguf_files.folder(tmp_path / "hf", family, **changes)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    file = gguf_files.gguf_of(source, model, tmp_path / "m.gguf")
    folder = read(file, tmp_path / "back")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.half().float())
    expected = logits(model)
    back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert float((logits(back) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    if family != "Gemma":  # which transformers does not read
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="m.gguf", config=back.config, dtype=torch.float32
        )
        assert torch.equal(logits(theirs), logits(back))
    told = AutoConfig.from_pretrained(folder).get_text_config()
    assert told.rope_parameters == AutoConfig.from_pretrained(source).rope_parameters


def test_quantised_values_are_those_of_the_format(tmp_path: Path) -> None:
    file = small(tmp_path, "Q8_0")
    name = "model.layers.0.mlp.down_proj.weight"
    before = load_file(tmp_path / "hf" / "model.safetensors")[name]
    after = load_file(read(file, tmp_path / "back") / "model.safetensors")[name]
    blocks = before.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    assert np.abs(after.reshape(-1, 32) - blocks).max() <= scale.max() * 0.51
    steps = after.reshape(-1, 32) / scale
    assert np.allclose(steps, np.round(steps), atol=1e-3)


@pytest.mark.parametrize("kind", ["byte level", "pieces", "pieces with a space before"])
def test_ids_are_those_of_the_source(kind: str, tmp_path: Path) -> None:
    is_bytes, space = kind == "byte level", kind.endswith("before")
    tokenizer = gguf_files.byte_level() if is_bytes else gguf_files.sentence_piece(space)
    file = small(tmp_path, tokenizer=tokenizer)
    folder = read(file, tmp_path / "back")
    back = AutoTokenizer.from_pretrained(folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file=file.name)
    for text in gguf_files.TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert back(text, add_special_tokens=False).input_ids == ids
        if is_bytes:
            assert theirs(text, add_special_tokens=False).input_ids == ids
            assert back.decode(ids) == tokenizer.decode(ids)
        else:
            assert ids_of_pieces(read_vocabulary(read_header(file)), text) == ids
    assert (back.eos_token, back.chat_template) == ("<eos>", tokenizer.chat_template)
    assert [str(field.contents()) for field in [GGUFReader(file).fields["general.name"]]] == [
        "tiny"
    ]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared tokenizers")
@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3", "mistral_v3"])
def test_ids_of_real_tokenizers(name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    file = small(tmp_path, tokenizer=tokenizer, vocab_size=len(tokenizer) + 5)
    back = AutoTokenizer.from_pretrained(read(file, tmp_path / "back"))
    for text in gguf_files.TEXTS:
        # Mistral's marks the beginning of a text; in a chat the text begins with a special token.
        text = f"<s>[INST]{text}[/INST]" if name == "mistral_v3" else text
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert back(text, add_special_tokens=False).input_ids == ids, text


def test_a_damaged_file_ends_in_one_message(tmp_path: Path) -> None:
    content = small(tmp_path).read_bytes()
    header = len(content) - sum(
        e.size for e in read_header(tmp_path / "small.gguf").tensors.values()
    )
    rng = random.Random(0)
    refused = 0
    for number in range(120):
        broken = bytearray(content)
        if number % 4 == 0:
            del broken[rng.randrange(header) :]
        else:
            where = rng.randrange(600) if number % 2 else rng.randrange(header)
            broken[where] ^= 1 << rng.randrange(8)
        file = tmp_path / "broken.gguf"
        file.write_bytes(broken)
        with suppress(UserError):  # anything else fails the test
            read(file, tmp_path / f"back{number}")
            refused -= 1
        refused += 1
    assert refused > 50


@pytest.mark.parametrize("at", [8, 16, 24])
def test_a_huge_count_is_refused_at_once(at: int, tmp_path: Path) -> None:
    file = small(tmp_path)
    content = bytearray(file.read_bytes())
    content[at : at + 8] = struct.pack("<Q", 2**60)
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged: it counts 1,152,921,504,606,846,976"):
        read_header(file)


def changed(file: Path, before: bytes, after: bytes) -> Path:
    content = file.read_bytes()
    assert len(before) == len(after)
    assert before in content
    file.write_bytes(content.replace(before, after))
    return file


def test_what_is_not_covered_is_refused_by_name(tmp_path: Path) -> None:
    file = small(tmp_path)
    original = file.read_bytes()
    for before, after, message in (
        (b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0bloom", "of the family 'bloom'"),
        (b"llama.vocab_size", b"llama.logit_mult", "llama.logit_mult is"),
        (b"blk.0.attn_q.w", b"blk.0.attn_x.w", "the tensor blk.0.attn_x.weight belongs to no"),
        (b"\5\0\0\0\0\0\0\0gpt-2", b"\5\0\0\0\0\0\0\0gpt-9", "tokenizer.ggml.pre is 'gpt-9'"),
        (b"\4\0\0\0\0\0\0\0gpt2", b"\4\0\0\0\0\0\0\0bert", "of the kind 'bert'"),
    ):
        file.write_bytes(original)
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            read(changed(file, before, after), tmp_path / f"back{len(message)}")


def test_settings_of_a_family_are_read_or_refused(tmp_path: Path) -> None:
    header = read_header(small(tmp_path))

    def config(**more: Any) -> dict[str, Any]:
        named = {f"llama.{key.replace('__', '.')}": value for key, value in more.items()}
        return config_of(replace(header, metadata=header.metadata | named), None)

    assert config(attention__sliding_window=64)["max_position_embeddings"] == 64
    assert config(rope__scaling__factor=2.0)["rope_parameters"]["rope_type"] == "linear"
    assert config(attention__head_count_kv=[2, 2])["num_key_value_heads"] == 2
    for more in (
        {"attn_logit_softcapping": 50.0},
        {"expert_count": 8},
        {"attention__head_count_kv": [2, 4]},
        {"block_count": 0},
        {"rope__freq_base": float("nan")},
        {"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0},
        {"attention__value_length": 7},
    ):
        with pytest.raises(UserError):
            config(**more)
    with pytest.raises(UserError, match="not those of Llama"):
        config_of(header, np.array([1, 2, 3, 4], np.float32))


def test_the_command_line_takes_a_file_or_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "model"
    home.mkdir()
    file = small(tmp_path).rename(home / "small.gguf")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('["What is stone?", "A lamp."]\n["river", "wind"]\n')
    for path in (file, home):
        assert main(["inspect", f"model={path}", f"data={rows}"]) == 0
    assert "A lamp" in capsys.readouterr().out
    sftx.train(
        model={"path": str(file)},
        data={"train": str(rows), "cache": str(tmp_path / "cache")},
        output=str(tmp_path / "run"),
        batch={"steps": 1},
        runtime={"progress": False, "device": "cpu", "threads": 1},
    )
    told = json.loads((tmp_path / "run" / "run.json").read_text())["gguf"]
    assert told["file"] == "small.gguf"
    assert len(told["sha256"]) == 64
    (home / "other.gguf").write_bytes(b"GGUF")
    assert main(["inspect", f"model={home}", f"data={rows}"]) == 2
    assert "holds 2 GGUF files (other.gguf, small.gguf)" in capsys.readouterr().err
    assert main(["inspect", f"model={tmp_path / 'absent.gguf'}", f"data={rows}"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    file = small(tmp_path)
    (tmp_path / "back").mkdir()
    program = (
        "import sys\nfrom pathlib import Path\nfrom sftx.gguf.header import read_header\n"
        "from sftx.gguf.read import write_folder\n"
        "write_folder(read_header(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(file), str(tmp_path / "back")]
    assert subprocess.run(command, check=False).returncode == 0


def test_two_processes_convert_once(tmp_path: Path) -> None:
    file = small(tmp_path)
    program = "import sys\nfrom sftx.gguf.read import converted_folder\nprint(converted_folder(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(file)]
    environment = {"SFTX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    said = {each.communicate()[0].strip() for each in both}
    assert len(said) == 1
    assert (Path(said.pop()) / "model.safetensors").exists()
    assert not list((tmp_path / "cache" / "gguf").glob(".*"))
