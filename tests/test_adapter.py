"""Adapters: rows of new tokens, adapters that train on from a folder, and what a saved folder
holds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sftx
from sftx.data.pack import build_pack
from sftx.data.tokenizer import Tokenizer
from sftx.model.adapter import attach
from sftx.model.folder import load_config
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.model.trainable import add_rows
from sftx.settings.schema import Config, Model
from sftx.training.memory_plan import meta_model
from sftx.training.optim import build_optimizer

TAUGHT = {264: True, 265: True, 5: False}
ROWS = [[f"What is {i} plus one?", f"<calc>It is {i + 1}."] for i in range(16)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def adapter(**settings: Any) -> Any:
    changes = {"adapter": {"method": "lora", "rank": 4, **settings}}
    return Config.model_validate({"model": "m", "data": "d", "output": "o", **changes}).adapter


def run(path: str, output: Path, **changes: Any) -> sftx.training.loop.Result:  # pyright: ignore
    base: dict[str, Any] = {
        "model": {"path": path},
        "data": {"rows": ROWS, "cache": str(output.parent / "cache")},
        "output": str(output),
        "batch": {"examples_per_step": 8, "epochs": 2},
        "optim": {"learning_rate": 1e-2},
        "adapter": {"method": "lora", "rank": 4},
        "runtime": {"progress": False, "device": "cpu", "threads": 1},
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) else value
    return sftx.train(**base)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_at_the_mean_and_train_exactly(tied: bool) -> None:
    model = tiny.model(tie_word_embeddings=tied)
    old = tiny.embeddings(model).weight.detach().clone()
    notes = add_rows(model, TAUGHT, seed=1)
    assert notes == [
        "3 listed tokens have rows that train, 2 of them new; the embeddings grew from 264 to 266 "
        "rows"
    ]
    new = tiny.embeddings(model).weight.detach()
    assert torch.equal(new[:264], old)
    assert not torch.equal(new[264], new[265])
    assert float((new[264:] - old.mean(0)).abs().max()) < 0.1 * float(old.std())
    twin = tiny.model(tie_word_embeddings=tied)
    add_rows(twin, TAUGHT, seed=1)
    assert torch.equal(tiny.head(twin).weight, tiny.head(model).weight)
    adapted = attach(model, adapter(), 0, sorted(TAUGHT))
    assert adapted is not None
    loss = PackLoss(model)
    rows = {n: p for n, p in loss.named_parameters() if p.requires_grad and "lora" not in n}
    assert [tuple(p.shape) for p in rows.values()] == [(3, 32)] * (1 if tied else 2)
    example = tiny.examples([40])[0]
    example.ids[3:6], example.weights[3:6] = [264, 265, 5], 1.0
    loss(to_tensors(build_pack([example]), torch.device("cpu"))).backward()
    reference = tiny.naive_loss(twin.double(), [example]) * float(example.weights[1:].sum())
    # The adapter's B is 0 at the start, so the unadapted twin has the same gradients
    reference.backward()
    matrices = [tiny.embeddings(twin).weight] + ([] if tied else [tiny.head(twin).weight])
    for ours, matrix in zip(
        sorted(rows.items(), key=lambda item: "lm_head" in item[0]), matrices, strict=True
    ):
        assert matrix.grad is not None
        assert ours[1].grad is not None
        theirs = matrix.grad[sorted(TAUGHT)]
        assert float((ours[1].grad - theirs).norm() / theirs.norm()) < 1e-5
    settings = Config.model_validate(
        {"model": "m", "data": "d", "output": "o", "optim": {"weight_decay": 0.1}}
    ).optim
    decayed = {id(p) for p in build_optimizer(loss, settings).param_groups[0]["params"]}
    assert not decayed & {id(p) for p in rows.values()}


def test_rows_for_tokens_that_are_not_listed_are_refused() -> None:
    with pytest.raises(sftx.UserError, match=r"not listed: ids \[264, 266\]"):
        add_rows(tiny.model(), {265: True, 267: True}, 0)


def test_the_tokenizer_of_a_run_has_the_added_tokens(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")
    settings = Model(
        path=path, add_tokens=["<calc>"], add_special_tokens=["<|im_start|>", "<|user|>"]
    )
    made = Tokenizer.of_model(settings)
    assert made.added_token_ids == {264: True, 265: True, 4: False}
    assert made.encode("a<calc>b")[1] == 264
    assert made.is_special("<|im_start|>")
    assert not made.is_special("<calc>")
    assert made.fingerprint != Tokenizer.load(path).fingerprint
    with pytest.raises(sftx.UserError, match="empty"):
        Tokenizer.of_model(Model(path=path, add_tokens=[""]))


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_with_a_template_of_new_tokens_serves_them(tied: bool, tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model", tie_word_embeddings=tied)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    model = {"add_tokens": ["<calc>"], "add_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    data = {"template": str(tmp_path / "chat.jinja")}
    result = run(path, tmp_path / "run", model=model, data=data, adapter={"merge": True})
    notes = json.loads((result.folder / "run.json").read_text())["notes"]
    assert notes[:-1] == [
        "3 listed tokens have rows that train, 3 of them new; the embeddings grew from 264 to 267 "
        "rows"
    ]
    assert notes[-1].startswith("the adapter is in (parameters): down_proj x 2 (")
    tensors = load_file(result.folder / "adapter_model.safetensors")
    rows = [name for name in tensors if "lora" not in name]
    assert len(rows) == (1 if tied else 2)
    assert all(name.endswith("token_adapter.trainable_tokens_delta") for name in rows)
    base = AutoModelForCausalLM.from_pretrained(path)
    base.resize_token_embeddings(267, mean_resizing=False)
    ids = torch.tensor([[264, 20, 265, 30, 266, 40]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, result.folder).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(result.folder / "merged").eval()
        assert merged.config.tie_word_embeddings == tied
        assert float((merged(ids).logits - adapted).abs().max()) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    assert tokenizer.convert_tokens_to_ids(["<calc>", "<|im_start|>", "<|im_end|>"]) == [
        264,
        265,
        266,
    ]
    assert 266 in merged.generation_config.eos_token_id


def test_ids_beyond_the_model_are_refused_where_nobody_asked(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<calc>"])
    tokenizer.save_pretrained(tmp_path / "more")
    with pytest.raises(
        sftx.UserError, match=r"264 is outside .* must be listed in model\.add_tokens"
    ):
        run(path, tmp_path / "run", model={"tokenizer": str(tmp_path / "more")})
    result = run(
        path,
        tmp_path / "run",
        model={"tokenizer": str(tmp_path / "more"), "add_tokens": ["<calc>"]},
    )
    assert "1 of them new" in json.loads((result.folder / "run.json").read_text())["notes"][0]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_saved_adapter_trains_on(method: str, tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")
    data, model = {"eval_rows": ROWS}, {"add_tokens": ["<calc>"]}
    first = run(
        path, tmp_path / "first", adapter={"method": method, "alpha": 8}, data=data, model=model
    )
    settings: dict[str, Any] = {
        "adapter": {"method": method, "path": str(first.folder)},
        "data": data,
        "model": model,
    }
    again = run(path, tmp_path / "again", **settings)
    assert again.eval_before == first.eval_after
    assert again.eval_after["loss"] < first.eval_after["loss"]
    saved = json.loads((again.folder / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_dora"]) == (4, 8, method == "dora")
    before, after = (load_file(r.folder / "adapter_model.safetensors") for r in (first, again))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_settings_that_contradict_a_saved_adapter_are_refused(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")
    first = run(path, tmp_path / "first", adapter={"targets": ["q_proj", "v_proj"]})
    pickled = tmp_path / "pickled"
    shutil.copytree(first.folder, pickled)
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"adapter": {"rank": 8}}, r"adapter\.rank: 8, but the adapter in .* has 4; leave it out"),
        ({"adapter": {"method": "dora"}}, r"adapter\.method: dora, but the adapter in .* has lora"),
        ({"adapter": {"targets": ["q_proj"]}}, r"adapter\.targets"),
        (
            {"adapter": {"path": str(tmp_path / "nothing")}},
            r"adapter\.path: .*nothing: there is no such folder",
        ),
        (
            {"adapter": {"path": str(pickled)}},
            r"adapter\.path: .* has no adapter_model.safetensors; pickled",
        ),
        ({"model": {"add_tokens": ["<calc>"]}}, r"model\.add_tokens: .* trains the rows None"),
        (
            {"model": {"path": tiny.folder(tmp_path / "deep", num_hidden_layers=3)}},
            r"adapter\.path: .* does not fit",
        ),
    ]
    for number, (changes, message) in enumerate(wrong):
        settings = {
            "model": {},
            **changes,
            "adapter": {"path": str(first.folder), **changes.get("adapter", {})},
        }
        with pytest.raises(sftx.UserError, match=message):
            run(path, tmp_path / str(number), **settings)


def test_a_dora_with_the_scale_of_rslora_is_no_other_dora(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")
    first = run(path, tmp_path / "first", adapter={"method": "dora"})
    file = first.folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_rslora": True}))
    asked = {"method": "dora", "path": str(first.folder)}
    with pytest.raises(sftx.UserError, match="has dora and rslora; leave it out"):
        run(path, tmp_path / "again", adapter=asked)


@pytest.mark.parametrize(("method", "peak"), [("none", "2e-05"), ("lora", "0.0002")])
def test_the_default_learning_rate_is_that_of_the_method_and_is_shown(
    method: Literal["none", "lora", "rslora", "dora"],
    peak: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings: dict[str, Any] = {
        "batch": {"steps": 1},
        "optim": {"learning_rate": None},
        "runtime": {"progress": True},
    }
    sftx.train(
        model=tiny.folder(tmp_path / "model"),
        data={"rows": ROWS, "cache": str(tmp_path / "cache")},
        output=str(tmp_path / "run"),
        adapter=method,
        **settings,
    )
    assert f"peak learning rate {peak}\n" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert record["learning_rate"] == float(peak)


def test_a_saved_folder_is_laid_out_as_servers_expect(tmp_path: Path) -> None:
    """vLLM reads r, lora_alpha, target_modules, bias, modules_to_save, use_rslora and use_dora;
    llama.cpp's converter reads lora_alpha and the base's name, and takes no tensor but lora_A and
    lora_B.
    """
    path = tiny.folder(tmp_path / "model")
    result = run(path, tmp_path / "run", data={"rows": [["a", "b"]] * 8})
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["base_model_name_or_path"]) == (
        "LORA",
        "CAUSAL_LM",
        path,
    )
    assert (config["r"], config["lora_alpha"], config["bias"], config["modules_to_save"]) == (
        4,
        32.0,
        "none",
        None,
    )
    assert (config["use_rslora"], config["use_dora"], config["inference_mode"]) == (
        False,
        False,
        True,
    )
    assert config["target_modules"]
    base = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    for name, tensor in load_file(result.folder / "adapter_model.safetensors").items():
        assert name.startswith("base_model.model.model.layers.")
        stem, kind, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        out_features, in_features = base[f"{stem}.weight"].shape
        assert (
            tuple(tensor.shape) == {"lora_A": (4, in_features), "lora_B": (out_features, 4)}[kind]
        )


def test_an_adapter_that_trains_on_computes_as_it_did_when_it_was_new(tmp_path: Path) -> None:
    first = run(tiny.folder(tmp_path / "model"), tmp_path / "first")
    kinds = []
    for settings in ({}, {"path": str(first.folder)}):
        adapted = attach(tiny.model(tie_word_embeddings=True), adapter(**settings), 0)
        assert adapted is not None
        kinds.append({name: type(module) for name, module in adapted.named_modules()})
    assert kinds[0] == kinds[1]


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_outline_of_a_run_that_continues_an_adapter_warns_of_nothing(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")
    first = run(path, tmp_path / "first")
    sections = {"model": path, "adapter": {"method": "lora", "path": str(first.folder)}}
    config = Config.model_validate({"data": "d", "output": "o", **sections})
    outlined = meta_model(config, load_config(config.model), {})
    assert {p.device.type for p in outlined.parameters()} == {"meta"}
