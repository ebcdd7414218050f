"""`sftx export` in its formats: what is written is what was trained, or nothing is written."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sftx
from sftx.cli import main
from sftx.gguf.modelfile import modelfile, pieces_of
from sftx.gguf.tensors import Layout
from sftx.gguf.vocabulary_of import vocabulary_of
from sftx.training import hand_over_gguf, hand_over_push, hand_over_rows

ROWS = [[f"What is {i} plus one?", f"It is {i + 1}, as river and stone."] for i in range(16)]
IDS = torch.tensor([[264, 20, 31, 30, 264, 40, 9]])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `lora` with checkpoints, and `full`."""
    home = tmp_path_factory.mktemp("hand-over")
    kinds: dict[str, Any] = {"lora": {"method": "lora", "rank": 4}, "full": {"method": "none"}}
    for name, adapter in kinds.items():
        sftx.train(
            model={"path": str(gguf_files.folder(home / f"base-{name}"))},
            data={"rows": ROWS, "cache": str(home / "cache")},
            output=str(home / name),
            adapter=adapter,
            checkpoint={"every": 1, "keep": 9},
            batch={"examples_per_step": 8, "steps": 3},
            optim={"learning_rate": 1e-2},
            runtime={"progress": False, "device": "cpu", "threads": 1},
        )
    return home


def logits(folder: Path, **more: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    with torch.no_grad():
        return model(IDS).logits


def weights(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]


def test_gguf_gives_the_logits_of_the_folder(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(home / "lora")
    assert main(["export", run, f"to={tmp_path / 'hf'}"]) == 0
    assert main(["export", run, f"to={tmp_path / 'gguf'}", "format=gguf", "dtype=bf16"]) == 0
    said = capsys.readouterr().out
    assert "16 rows give the token ids of training in the GGUF file" in said
    assert "4 of 4 greedy answers equal" in said
    expected = logits(tmp_path / "hf")
    found = logits(tmp_path / "gguf", gguf_file="model.gguf")
    moved = float((found - expected).abs().max() / expected.abs().max())
    assert 1e-6 < moved < 5e-2
    names = sorted(path.name for path in (tmp_path / "gguf").iterdir())
    assert names == ["Modelfile", "README.md", "model.gguf"]
    text = (tmp_path / "gguf" / "Modelfile").read_text()
    assert 'PARAMETER stop "<|end|>"' in text
    assert "<|user|>{{ .Content }}" in text
    assert "greedy answers equal" in (tmp_path / "gguf" / "README.md").read_text()


def without_merges(folder: Path, rows: int) -> Any:
    """The vocabulary of a folder, without half of its merges."""
    vocabulary = vocabulary_of(folder, rows)
    vocabulary.merges = vocabulary.merges[::2]
    return vocabulary


def test_a_file_that_is_not_what_was_trained_is_not_left(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(home / "full"), f"to={tmp_path / 'out'}", "format=gguf"]
    with monkeypatch.context() as planted:
        planted.setattr(Layout, "to_gguf", lambda self, name, values: values)
        assert main(command) == 2
        assert "gives other logits than the trained weights" in capsys.readouterr().err
    with monkeypatch.context() as planted:
        planted.setattr("sftx.gguf.write.vocabulary_of", without_merges)
        assert main(command) == 2
        assert "sends other tokens than were trained" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_served_under_the_names_of_servers(home: Path, tmp_path: Path) -> None:
    from sftx.training.hand_over_adapter import check_names

    out = tmp_path / "out"
    assert main(["export", str(home / "lora"), f"to={out}", "format=adapter"]) == 0
    base = AutoModelForCausalLM.from_pretrained(home / "base-lora")
    assert "model.layers.0.self_attn.q_proj" in check_names(out, base)
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("layers", "blocks"): t for name, t in tensors.items()}, file)
    with pytest.raises(sftx.UserError, match="servers such as vLLM do not match"):
        check_names(out, base)
    assert main(["export", str(home / "full"), f"to={tmp_path / 'b'}", "format=adapter"]) == 2


def test_an_adapter_that_changes_nothing_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(home / "lora", tmp_path / "run")
    file = run / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(t) for name, t in load_file(file).items()}, file)
    assert main(["export", str(run), f"to={tmp_path / 'out'}", "format=adapter"]) == 2
    assert "the same logits as without it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_average_and_mix_are_means_of_whole_weights(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(home / "lora")
    for step in "12":
        assert main(["export", run, f"to={tmp_path / step}", f"step={step}"]) == 0
    assert main(["export", run, f"to={tmp_path / 'mean'}", "average=1,2"]) == 0
    expected = (weights(tmp_path / "1") + weights(tmp_path / "2")) / 2
    assert torch.allclose(weights(tmp_path / "mean"), expected, atol=1e-6)
    capsys.readouterr()
    assert main(["export", run, f"to={tmp_path / 'mix'}", "step=2", "mix=0.25"]) == 0
    base = weights(home / "base-lora")
    expected = base + 0.25 * (weights(tmp_path / "2") - base)
    assert torch.allclose(weights(tmp_path / "mix"), expected, atol=1e-6)
    assert not torch.allclose(weights(tmp_path / "mix"), base, atol=1e-4)
    said = capsys.readouterr().out
    assert "trained: KL from the base " in said
    assert "general text" not in said, "the run has no eval.general"


@pytest.mark.slow
def test_the_loss_on_the_general_text_stands_beside_a_mixture(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(home / "lora", tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["eval"]["prompts"] = 1
    (run / "run.json").write_text(json.dumps(facts))
    assert main(["export", str(run), f"to={tmp_path / 'mix'}", "mix=0.5"]) == 0
    said = capsys.readouterr().out
    losses = re.findall(r"(base|trained|mixed):[^;]*general text ([\d.]+)", said)
    assert [name for name, _ in losses] == ["base", "trained", "mixed"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('["What is 7?", "A number."]\n')
    for name, folder in (("base", home / "base-lora"), ("mixed", tmp_path / "mix")):
        command = ["eval", str(folder), str(rows), "new_tokens=2", f"json={tmp_path / 'n.json'}"]
        assert main([*command, "data.template=plain"]) == 0
        numbers = json.loads((tmp_path / "n.json").read_text())["model"]["numbers"]
        assert float(dict(losses)[name]) == pytest.approx(numbers["general loss"], abs=2e-4)
    facts["config"]["eval"]["general"] = False
    (run / "run.json").write_text(json.dumps(facts))
    assert main(["export", str(run), f"to={tmp_path / 'none'}", "average=1,2"]) == 0
    assert "general text" not in capsys.readouterr().out


def test_rows_of_a_file_and_fp16(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('["What is 7?", "A number."]\n["<|end|> what?", "x"]\n["b", "c"]\n')
    command = ["export", str(home / "full"), f"to={tmp_path / 'out'}", "dtype=fp16"]
    assert main([*command, f"data={rows}"]) == 0
    assert "2 rows give the token ids" in capsys.readouterr().out
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_other_types_are_left_to_llama_cpp(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "export",
        str(home / "full"),
        f"to={tmp_path / 'out'}",
        "format=gguf",
        "dtype=q4_k_m",
    ]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(command) == 2
    assert "other types need llama-quantize of llama.cpp" in capsys.readouterr().err
    script = tmp_path / "llama-quantize"
    script.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && /bin/cp "$1" "$2"\n')
    script.chmod(0o755)
    assert main(command) == 0
    assert (tmp_path / "out" / "model.gguf").exists()


def test_mistakes_are_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["format=onnx"], "format='onnx'; allowed: hf, gguf, adapter"),
        (["dtype=int8"], "dtype='int8'; allowed: auto, fp32, bf16, fp16"),
        (["mix=1.5"], "a number between 0 and 1"),
        (["average=1"], "at least two steps"),
        (["average=1,2", "step=1"], "set one"),
        (["average=1,9"], "there are"),
        (["format=adapter", "mix=0.5"], "takes no average=, mix= or dtype="),
        ([f"data={tmp_path / 'absent.jsonl'}"], "absent.jsonl"),
    ):
        assert main(["export", str(home / "lora"), f"to={tmp_path / 'out'}", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_push_is_private_unless_asked_otherwise(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Hub:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
            seen.append((name, private))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> None:
            seen.append(sorted(path.name for path in Path(folder_path).iterdir()))

    monkeypatch.setattr(hand_over_push, "HfApi", Hub)
    out = tmp_path / "out"
    assert main(["export", str(home / "full"), f"to={out}", "push=me/mine"]) == 0
    assert seen[0] == ("me/mine", True)
    assert {"model.safetensors", "README.md"} <= set(seen[1])


def chat(opening: str, default: str = "") -> Any:
    def render(messages: list[dict[str, str]]) -> str:
        said = [f"<{m['role']}>{m['content']}</>\n" for m in messages]
        return (
            opening
            + ("" if messages[0]["role"] == "system" else default)
            + "".join(said)
            + "<assistant>"
        )

    return render


@pytest.mark.parametrize(
    ("opening", "default"), [("", ""), ("<s>", ""), ("<s>", "<system>Be kind</>\n")]
)
def test_a_modelfile_writes_what_the_template_writes(opening: str, default: str) -> None:
    render = chat(opening, default)
    pieces = pieces_of(render, opening)
    assert pieces is not None
    talk = [
        {"role": role, "content": role[0] * 3}
        for role in ("user", "assistant", "user", "assistant", "user")
    ]
    for messages in (talk, [{"role": "system", "content": "x"}, *talk]):
        assert opening + pieces.write(messages) == render(messages)
    text = modelfile("m.gguf", pieces, ["</>"])
    assert text.startswith("FROM ./m.gguf\nTEMPLATE")
    assert ("Be kind" in text) == bool(default)


def test_a_template_that_cannot_be_told_in_pieces_has_no_template_line() -> None:
    def render(messages: list[dict[str, str]]) -> str:
        return "".join(f"{len(messages) - at}{m['content']}" for at, m in enumerate(messages))

    assert pieces_of(render, "") is None
    assert "TEMPLATE" not in modelfile("m.gguf", None, [])


def test_rows_come_from_each_file_in_turn(tmp_path: Path) -> None:
    for name, texts in {"a": ["one", "two"], "b": ["three", "four"]}.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    rows = hand_over_rows.rows_of_file(str(tmp_path), 3)
    assert [row.text for row in rows] == ["one", "two", "three"]


def test_a_bar_of_transformers_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its reader of GGUF has one that no setting of transformers hides."""
    folder = gguf_files.folder(tmp_path)

    def loaded(*_: object, **__: object) -> torch.nn.Module:
        print("Converting and de-quantizing GGUF tensors...: 100%", file=sys.stderr)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(hand_over_gguf.AutoModelForCausalLM, "from_pretrained", loaded)
    back = hand_over_gguf.Back(tmp_path / "model.gguf", Path(folder), [], None)
    assert back.by_transformers() is not None
    assert capsys.readouterr().err == ""
