"""The main job, end to end on a tiny model: what comes out, and what a run may and may not depend
on.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sftx
from sftx import distributed
from sftx.training import checkpoint, loop
from sftx.training.best import costs
from sftx.training.optim import build_optimizer, learning_rate
from sftx.training.signals import Diverged, StopFlag, Stopped

ROWS = [[f"What is {i} plus one?", f"It is {i + 1}."] for i in range(40)]


def settings(path: str, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of ten steps; every setting may be replaced."""
    base: dict[str, Any] = {
        "model": path,
        "data": {"rows": ROWS, "cache": str(output.parent / "cache")},
        "output": str(output),
        "batch": {"examples_per_step": 8, "epochs": 2},
        "optim": {"learning_rate": 3e-3, "weight_decay": 0.1},
        "runtime": {"progress": False, "device": "cpu", "threads": 1},
    }
    return tiny.merged(base, changes)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["step"]]


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def test_a_run_leaves_a_folder_that_serves_what_was_trained(model: str, tmp_path: Path) -> None:
    result = sftx.train(**settings(model, tmp_path / "run", data={"eval_split": 0.1}))
    assert result.eval_before is not None
    assert result.eval_after is not None
    assert result.eval_after["loss"] < result.eval_before["loss"] - 0.5
    trained = AutoModelForCausalLM.from_pretrained(result.folder)
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert (
        tokenizer.convert_tokens_to_ids("<|end|>")
        in GenerationConfig.from_pretrained(result.folder).eos_token_id
    )
    assert trained.config._attn_implementation != "sftx_segments"
    assert len(losses(result.folder)) == result.steps == 9
    ledger = json.loads((result.folder / "ledger.json").read_text())["all"]
    assert ledger["read"] == ledger["trained"] + ledger["split"] + ledger["dropped"] == 36
    assert "nats per token" in (result.folder / "README.md").read_text()


def test_pack_size_changes_nothing_but_rounding(model: str, tmp_path: Path) -> None:
    whole = sftx.train(**settings(model, tmp_path / "whole", runtime={"tokens_per_pack": 100_000}))
    cut = sftx.train(**settings(model, tmp_path / "cut", runtime={"tokens_per_pack": 1}))
    assert losses(whole.folder) == pytest.approx(losses(cut.folder), rel=1e-5)
    assert json.loads((cut.folder / "metrics.jsonl").read_text().splitlines()[0])["packs"] == 8


def test_bf16_computes_over_fp32_weights(model: str, tmp_path: Path) -> None:
    exact = sftx.train(**settings(model, tmp_path / "exact"))
    half = sftx.train(**settings(model, tmp_path / "half", runtime={"precision": "bf16"}))
    assert losses(half.folder) != losses(exact.folder)
    assert losses(half.folder) == pytest.approx(losses(exact.folder), rel=0.02)
    assert weights(half.folder)["model.norm.weight"].dtype == torch.float32


def test_the_same_run_twice_is_the_same_to_the_bit(model: str, tmp_path: Path) -> None:
    first, second = (sftx.train(**settings(model, tmp_path / name)) for name in ("first", "second"))
    assert losses(first.folder) == losses(second.folder)
    for name, tensor in weights(first.folder).items():
        assert torch.equal(tensor, weights(second.folder)[name])


@pytest.mark.parametrize("adapter", [{}, {"method": "lora", "rank": 4, "dropout": 0.1}])
def test_a_killed_run_continues_to_the_bit(
    model: str, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    extra = {"adapter": adapter, "checkpoint": {"every": 3}}
    whole = sftx.train(**settings(model, tmp_path / "whole", **extra))
    config = settings(model, tmp_path / "killed", **extra)
    for record in sftx.steps(**config):
        if record.step == 5:
            break  # the generator dies here, two steps after the checkpoint
    assert checkpoint.newest(tmp_path / "killed" / "checkpoints").step == 3  # pyright: ignore[reportOptionalMemberAccess]
    result = sftx.train(**config)
    assert losses(result.folder) == losses(whole.folder)
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    for key, tensor in weights(whole.folder, name).items():
        assert torch.equal(tensor, weights(result.folder, name)[key])
    lines = [
        json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 11))
    for counted in ("tokens", "targets"):
        assert lines[-1][f"total_{counted}"] == sum(line[counted] for line in lines)
    measured = json.loads((result.folder / "run.json").read_text())["measured"]
    assert measured["seconds"] == pytest.approx(sum(line["seconds"] for line in lines))


def test_a_continued_run_keeps_its_packs_however_much_memory_there_is_now(
    model: str, tmp_path: Path
) -> None:
    extra = {"checkpoint": {"every": 3}, "runtime": {"tokens_per_pack": 100}}
    whole = sftx.train(**settings(model, tmp_path / "whole", **extra))
    for record in sftx.steps(**settings(model, tmp_path / "killed", **extra)):
        if record.step == 5:
            break
    result = sftx.train(**settings(model, tmp_path / "killed", checkpoint={"every": 3}))
    assert json.loads((result.folder / "run.json").read_text())["tokens_per_pack"] == 100
    for key, tensor in weights(whole.folder).items():
        assert torch.equal(tensor, weights(result.folder)[key])


def test_a_damaged_checkpoint_is_passed_over(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = sftx.train(**settings(model, tmp_path / "whole", checkpoint={"every": 2}))
    config = settings(model, tmp_path / "run", checkpoint={"every": 2})
    for record in sftx.steps(**config):
        if record.step == 7:
            break
    damaged = tmp_path / "run" / "checkpoints" / "step-00000006" / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    result = sftx.train(**config)
    assert "damaged" in capfd.readouterr().err
    assert losses(result.folder) == losses(whole.folder)


def test_a_held_out_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters())
    evaluations: dict[int, dict[str, float]] = {}
    for step, loss in enumerate([2.0, float("nan"), 3.0], 1):
        evaluations[step] = {"loss": loss}
        found = costs(evaluations, "loss")
        state = checkpoint.State(step, "", {})
        checkpoint.save(tmp_path, state, model, optimizer, keep=1, costs=found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_finished_run_takes_no_step_and_other_settings_are_refused(
    model: str, tmp_path: Path
) -> None:
    config = settings(model, tmp_path / "run")
    before = sftx.train(**config)
    stamp = (before.folder / "model.safetensors").stat().st_mtime_ns
    assert list(sftx.steps(**config)) == []
    assert sftx.train(**config).steps == before.steps
    assert (before.folder / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(sftx.UserError, match=r"(?s)other settings.*learning_rate.*0\.001"):
        sftx.train(**settings(model, tmp_path / "run", optim={"learning_rate": 1e-3}))
    with pytest.raises(sftx.UserError, match="other settings or data"):
        sftx.train(**settings(model, tmp_path / "run", data={"rows": ROWS[1:]}))


def test_lora_leaves_an_adapter_and_a_merged_model_that_agree(model: str, tmp_path: Path) -> None:
    result = sftx.train(
        **settings(model, tmp_path / "run", adapter={"method": "lora", "rank": 4, "merge": True})
    )
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.randint(8, 200, (1, 20))
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, result.folder).eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(result.folder / "merged").eval()(ids).logits
    assert not torch.allclose(plain, adapted, atol=1e-3)
    assert float((adapted - merged).abs().max()) < 1e-5
    assert AutoTokenizer.from_pretrained(result.folder).chat_template == tiny.CHAT_TEMPLATE


@pytest.mark.slow
def test_a_signal_saves_and_exits_with_75(model: str, tmp_path: Path) -> None:
    config = settings(model, tmp_path / "run", batch={"epochs": 400})
    script = f"import sftx\nfor r in sftx.steps(**{config!r}):\n    print(r.step, flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 5:
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(60) == 75
    state = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state.step >= 5
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "stopped"
    assert run["stopped_at"] == state.step == len(losses(tmp_path / "run"))


def test_numbers_that_are_not_finite_are_never_applied_and_stop_the_run(
    model: str, tmp_path: Path
) -> None:
    poisoned = AutoModelForCausalLM.from_pretrained(model)
    config = settings(
        model,
        tmp_path / "run",
        optim={"max_bad_steps": 2, "learning_rate": 3e38, "max_grad_norm": 0},
    )
    with pytest.raises(SystemExit) as stopped:
        sftx.train(**config)
    assert stopped.value.code == 3
    assert "bad_steps.jsonl" in stopped.value.message  # pyright: ignore[reportAttributeAccessIssue]
    bad = [
        json.loads(line) for line in (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()
    ]
    assert len(bad) == 3
    assert bad[0]["rows"][0].startswith("rows, row ")
    assert None in losses(tmp_path / "run")
    with torch.no_grad():
        poisoned.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    poisoned.save_pretrained(tmp_path / "poisoned")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "poisoned")
    with pytest.raises(sftx.UserError, match="not finite before training"):
        sftx.train(**settings(str(tmp_path / "poisoned"), tmp_path / "other"))


def test_bad_steps_that_are_not_in_a_row_are_skipped_for_ever(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, number = loop.train_step, itertools.count(1)

    def poisoned(loss: Any, optimizer: Any, packs: Any, *rest: Any) -> Any:
        bad = next(number) % 2 == 0
        packs = (
            [replace(pack, weight=pack.weight * float("nan")) for pack in packs] if bad else packs
        )
        return train_step(loss, optimizer, packs, *rest)

    monkeypatch.setattr(loop, "train_step", poisoned)
    result = sftx.train(**settings(model, tmp_path / "run", optim={"max_bad_steps": 1}))
    assert [loss is None for loss in losses(result.folder)] == [False, True] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"path": "no/such/folder"}}, "no/such/folder"),
        ({"data": {"rows": [["a", "b"], ["a"]]}}, "odd"),
        ({"data": {"rows": []}}, "empty|nothing to train"),
        ({"data": {"rows": ROWS, "max_length": 100_000}}, "256 positions"),
        ({"data": {"rows": [{"input_ids": [5, 9999], "labels": [-100, 9999]}]}}, "9999"),
        ({"data": {"train": "no/such/file.jsonl"}}, "no/such/file.jsonl"),
    ],
)
def test_a_mistake_is_one_clear_message(
    model: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(sftx.UserError, match=message):
        sftx.train(**settings(model, tmp_path / "run", **changes))


def test_a_model_that_could_never_learn_to_stop_is_refused(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model", chat=False)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(sftx.UserError, match="EOS"):
        sftx.train(**settings(path, tmp_path / "run"))
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    path = tiny.folder(tmp_path / "whole")
    with pytest.raises(sftx.UserError, match=r"never learn to stop.*data.format: tokens"):
        sftx.train(**settings(path, tmp_path / "run", data={"rows": rows}))
    sftx.train(**settings(path, tmp_path / "run", data={"rows": rows, "format": "tokens"}))


def test_a_tokenizer_with_several_templates_is_saved_with_them(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": tiny.CHAT_TEMPLATE + "!"}
    tokenizer.save_pretrained(path)
    data = {"rows": ["a text"] * 8, "template": "none"}
    result = sftx.train(**settings(path, tmp_path / "run", data=data, batch={"epochs": 1}))
    assert AutoTokenizer.from_pretrained(result.folder).chat_template == tokenizer.chat_template


def test_one_row_is_enough(model: str, tmp_path: Path) -> None:
    assert (
        sftx.train(
            **settings(model, tmp_path / "run", data={"rows": [["a", "b"]]}, batch={"epochs": 1})
        ).steps
        == 1
    )


def test_output_must_not_overwrite_a_model(model: str, tmp_path: Path) -> None:
    with pytest.raises(sftx.UserError, match="overwritten"):
        sftx.train(**settings(model, Path(model)))
    other = tiny.folder(tmp_path / "other")
    with pytest.raises(sftx.UserError, match="no run of sftx"):
        sftx.train(**settings(model, Path(other)))


def test_schedules_are_functions_of_the_step() -> None:
    make = sftx.Config.model_validate
    config: dict[str, Any] = {"model": "m", "data": "d", "output": "o"}

    def curve(**optim: Any) -> list[float]:
        section = make({**config, "optim": optim}).optim
        return [learning_rate(step, 100, section, 1.0) for step in range(100)]

    assert curve(schedule="constant", warmup=0) == [1.0] * 100
    assert curve(schedule="linear", warmup=10)[:10] == pytest.approx(
        [(i + 1) / 10 for i in range(10)]
    )
    assert curve(schedule="linear", warmup=0.1)[55] == pytest.approx(0.5)
    assert curve(schedule="cosine", warmup=0)[50] == pytest.approx(0.5)
    assert curve(schedule="cosine", warmup=0, final_ratio=0.1)[99] == pytest.approx(0.1, abs=1e-3)
    stable = curve(schedule="wsd", warmup=10, decay=0.2)
    assert stable[10:80] == [1.0] * 70
    assert stable[90] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="the schedule is constant"):
        curve(schedule="constant", final_ratio=0.1)


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("family", "changes", "count"),
    [
        ("Llama", {"tie_word_embeddings": True}, 14),
        ("Cohere", {"use_qk_norm": True}, 14),
        ("GptOss", EXPERTS, 15),
    ],
)
def test_weight_decay_is_for_matrices_only(
    family: str, changes: dict[str, Any], count: int
) -> None:
    """Norms of heads and biases of experts have two dimensions too."""
    model = tiny.model(family, **changes)
    section = sftx.Config.model_validate(
        {"model": "m", "data": "d", "output": "o", "optim": {"weight_decay": 0.1}}
    ).optim
    decayed = {id(p) for p in build_optimizer(model, section).param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert any("q_proj.weight" in name for name in names)
    assert not [name for name in names if "norm" in name or "bias" in name or "embed" in name]
    assert len(names) == count


@pytest.mark.parametrize("asked", range(1, 8))
def test_whenever_a_signal_comes_what_is_said_to_be_saved_is(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    """It comes between two steps, packs of an evaluation, or what is done after them: where the
    flag is looked at.
    """
    looks = itertools.count(1)

    def look(flag: StopFlag) -> bool:
        flag.signal = flag.signal or (signal.SIGTERM if next(looks) == asked else None)
        return flag.signal is not None

    monkeypatch.setattr(StopFlag, "__call__", look)
    changes: dict[str, Any] = {"data": {"eval_split": 0.1}, "eval": {"every": 1, "at_start": False}}
    with pytest.raises(Stopped, match="75"):
        sftx.train(**settings(model, tmp_path / "run", batch={"epochs": 0.5}, **changes))
    stopped = json.loads((tmp_path / "run" / "run.json").read_text())["stopped_at"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:08d}").is_dir()


def test_a_merge_that_was_interrupted_is_made_up_for(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        model, tmp_path / "run", batch={"epochs": 0.2}, adapter={"method": "lora", "merge": True}
    )
    export = Mock(wraps=loop.write_merged, side_effect=[OSError("no space"), DEFAULT])
    monkeypatch.setattr(loop, "write_merged", export)
    with pytest.raises(OSError, match="no space"):
        sftx.train(**config)
    for _ in range(2):
        assert list(sftx.steps(**config)) == []
    assert export.call_count == 2, "once is enough"
    assert (tmp_path / "run" / "merged" / "model.safetensors").exists()


def test_a_signal_that_comes_while_ranks_agree_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flag = StopFlag()
    monkeypatch.setattr(
        distributed, "all_reduce_max", lambda number: flag.set(signal.SIGTERM, None) or number
    )
    assert (flag(), flag(), flag.signal) == (False, True, signal.SIGTERM)


@pytest.mark.slow
def test_a_run_that_diverges_names_the_checkpoint_that_is_being_written(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, train_step = checkpoint._write, loop.train_step
    monkeypatch.setattr(checkpoint, "_write", lambda *args: time.sleep(1) or write(*args))

    def poisoned(model: Any, optimizer: Any, packs: Any, *rest: Any) -> Any:
        first = all(state["step"] == 0 for state in optimizer.state.values())
        packs = (
            packs if first else [replace(pack, weight=pack.weight * float("nan")) for pack in packs]
        )
        return train_step(model, optimizer, packs, *rest)

    monkeypatch.setattr(loop, "train_step", poisoned)
    changes: dict[str, Any] = {
        "optim": {"max_bad_steps": 0},
        "checkpoint": {"every": 1, "background": True},
    }
    with pytest.raises(Diverged) as ended:
        sftx.train(**settings(model, tmp_path / "run", **changes))
    assert ended.value.message.endswith("last good checkpoint: step 1")
    monkeypatch.setattr(loop, "train_step", train_step)
    assert (
        sftx.train(**settings(model, tmp_path / "run", **changes)).steps == 10
    )  # it can be continued


def test_a_run_continues_only_in_the_precision_that_auto_meant(model: str, tmp_path: Path) -> None:
    for _ in sftx.steps(**settings(model, tmp_path / "run", checkpoint={"every": 1})):
        break
    path = tmp_path / "run" / "run.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"precision": "bfloat16"}))  # as it would be, begun on a GPU
    with pytest.raises(sftx.UserError, match="precision: 'bfloat16' in the run, 'float32' now"):
        sftx.train(**settings(model, tmp_path / "run"))
    path.write_text(json.dumps(facts))
    sftx.train(**settings(model, tmp_path / "run", runtime={"precision": "fp32"}))


@pytest.mark.parametrize("compile", ["auto", "on"])
def test_no_step_leaves_the_model_as_it_was(model: str, tmp_path: Path, compile: str) -> None:
    batch, runtime = {"examples_per_step": 8, "steps": 0}, {"compile": compile}
    base = settings(model, tmp_path / "run", data={"eval_split": 0.1}, runtime=runtime)
    given: dict[str, Any] = {**base, "batch": batch}
    result = sftx.train(**given)
    assert (result.steps, result.loss) == (0, None)
    assert result.eval_after == result.eval_before
    assert all(
        torch.equal(value, weights(Path(model))[name])
        for name, value in weights(result.folder).items()
    )
