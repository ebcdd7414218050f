"""`sftx verify`: every row of its table fails when its property is broken."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sftx import cli
from sftx.cli import verify as verify_verb
from sftx.model.pack_loss import PackLoss, Paths, TensorPack
from sftx.model.runtime import machine
from sftx.settings.keywords import RuntimeSettings
from sftx.settings.make import make_config
from sftx.settings.schema import Adapter, Config
from sftx.training import checkpoint
from sftx.types import Example
from sftx.verify import families, losses, runs, serving
from sftx.verify.families import names_of, summary, try_families
from sftx.verify.finding import compared, does_not_apply
from sftx.verify.oracle import Measured, Server, logits_of, plain_model
from sftx.verify.sample import Sample, take_sample


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Dialogues of two turns, of unequal length."""
    made = []
    for i in range(count):
        messages = []
        for turn in range(2):
            messages.append({"role": "user", "content": f"What is {i} plus {turn}?"})
            messages.append({"role": "assistant", "content": f"It is {i + turn}" + "!" * (i % 5)})
        made.append({"messages": messages})
    return made


class Given:
    """A model, rows, and what the plain model says of them."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny.folder(folder / "model")
        self.data = folder / "rows.jsonl"
        lines = [json.dumps(row) for row in rows()]
        self.data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "work").mkdir()
        config = self.config()
        self.sample: Sample = take_sample(config, folder / "work", 12, 128)
        self.examples: list[Example] = losses.chosen(self.sample.corpus)
        with machine(config.runtime) as here:
            self.alone: list[Measured] = losses.oracle(config.model, None, self.examples, here)
        self.straight = self.run("straight", Adapter())
        self.server = Server(self.straight.folder, trust=False)

    def config(self, **sections: Any) -> Config:
        runtime: RuntimeSettings = {
            "device": "cpu",
            "threads": 1,
            "precision": "fp32",
            "progress": False,
        }
        return make_config(
            model=self.model, data=str(self.data), output="unused", runtime=runtime, **sections
        )

    def run(self, name: str, adapter: Adapter) -> runs.ShortRun:
        return runs.run_through(runs.settings_of(self.sample, adapter, name))

    def losses(self) -> dict[str, str]:
        """The verdicts of the properties of the loss."""
        config = self.config()
        with machine(config.runtime) as here:
            found = losses.compare_losses(config.model, None, self.examples, self.alone, here)
        return {finding.what: finding.verdict for finding in found.findings}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("verify"))


def test_the_properties_of_the_loss_hold(given: Given) -> None:
    verdicts = given.losses()
    assert list(verdicts) == [
        "fused loss = the model's own logits",
        "packed = separate",
        "any pack size",
        "any order",
        "shared prefixes = separate",
    ]
    assert {*verdicts.values()} == {"equal"}


def _segments(pack: TensorPack) -> int:
    return len(pack.cu_seqlens_cpu) - 1


FAULTS: dict[str, Callable[[TensorPack, list[Example]], bool]] = {
    "fused loss = the model's own logits": lambda pack, data: _segments(pack) == 1,
    "packed = separate": lambda pack, data: _segments(pack) == len(data),
    "any pack size": lambda pack, data: 1 < _segments(pack) < len(data),
    "any order": lambda pack, data: (
        _segments(pack) == len(data) and pack.longest > 0 and not _same_first(pack, data)
    ),
    "shared prefixes = separate": lambda pack, data: bool(pack.prefixes),
}
"""When a small error is put into the loss, so that the property no longer holds."""


def _same_first(pack: TensorPack, data: list[Example]) -> bool:
    return pack.ids[: len(data[0].ids)].tolist() == data[0].ids.tolist()


@pytest.mark.parametrize("what", FAULTS)
def test_a_property_of_the_loss_that_is_broken_is_seen(
    what: str, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start-up checks, which would refuse such a model, are off: the table stands alone."""
    forward = PackLoss.forward

    def wrong(self: PackLoss, pack: TensorPack) -> torch.Tensor:
        value = forward(self, pack)
        return value * 1.001 if FAULTS[what](pack, given.examples) else value

    def allow(loss: PackLoss, *_: object, **__: object) -> list[str]:
        loss.take(Paths(shares_prefixes=True))
        return []

    monkeypatch.setattr(losses, "check_paths", allow)
    monkeypatch.setattr(PackLoss, "forward", wrong)
    verdicts = given.losses()
    assert verdicts[what] == "differs"
    others = {name for name, verdict in verdicts.items() if verdict == "differs"} - {what}
    assert not others or what in ("packed = separate", "fused loss = the model's own logits")


def test_a_run_is_resumed_to_the_bit_and_a_lost_moment_is_seen(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = runs.compare_resumed(given.straight)
    assert (found.verdict, found.differences["weights"]) == ("equal", 0.0)

    restore = checkpoint.restore

    def forgetful(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> Any:
        state = restore(folder, model, optimizer)
        for moments in optimizer.state.values():
            moments["exp_avg"].zero_()
        return state

    monkeypatch.setattr(checkpoint, "restore", forgetful)
    shutil.rmtree(given.straight.folder.with_name("resumed"))
    assert runs.compare_resumed(given.straight).verdict == "differs"


def test_two_ranks_that_train_otherwise_are_seen(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process stands for the two; the real ones are in a slow test."""

    def other(config: Config) -> str:
        runs.run_through(config.model_copy(update={"seed": 1}))
        return ""

    monkeypatch.setattr(runs, "_run_two_ranks", other)
    assert runs.compare_ranks(given.straight, 1).verdict == "differs"
    monkeypatch.setattr(runs, "_run_two_ranks", lambda config: "ended with code 1")
    found = runs.compare_ranks(given.straight, 1)
    assert (found.verdict, found.why) == ("differs", "ended with code 1")


def test_where_two_ranks_cannot_be_tried_the_reason_is_told(given: Given) -> None:
    found = runs.compare_ranks(given.straight, 10**12)
    assert found.verdict == "not applicable"
    assert "GiB" in found.why
    given.straight.model.config.attention_dropout = 0.1
    found = runs.compare_ranks(given.straight, 1)
    given.straight.model.config.attention_dropout = 0.0
    assert "dropout" in found.why


@pytest.mark.slow
def test_one_rank_is_two(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = given.straight.config.model_copy(
        update={"output": str(given.sample.folder / "ranks" / "straight")}
    )
    straight = runs.run_through(config)
    assert runs.compare_ranks(straight, 1).verdict == "equal"


def test_served_prompts_are_the_trained_ones_and_another_template_is_seen(given: Given) -> None:
    found = serving.compare_prompts(given.sample, given.server)
    assert found.verdict == "equal"
    assert "24 turns of 12 rows" in found.how
    other = Server(given.straight.folder, trust=False)
    other.tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("<|end|>\n", "<|end|>")
    found = serving.compare_prompts(given.sample, other)
    assert (found.verdict, found.differences) == ("differs", {"cases": 24.0})
    assert "rows.jsonl:1, message 2: equal up to token" in found.why


def test_a_target_that_is_not_behind_the_prompt_is_seen(given: Given) -> None:
    """The first token of each output is context: the model would not learn to begin."""
    late = []
    for taken in given.sample.rows:
        examples = []
        for example in taken.examples:
            weights = example.weights.copy()
            weights[1:][weights[:-1] == 0] = 0
            examples.append(replace(example, weights=weights))
        late.append(replace(taken, examples=examples))
    found = serving.compare_prompts(replace(given.sample, rows=late), given.server)
    assert found.differences == {"cases": 24.0}


def test_a_row_that_spells_a_special_token_is_left_out(given: Given) -> None:
    taken = given.sample.rows[0]
    messages = [dict(message) for message in taken.row.messages]
    messages[0]["content"] = "What is <|end|>?"
    row = replace(taken.row, messages=tuple(messages))
    sample = replace(given.sample, rows=[replace(taken, row=row), given.sample.rows[1]])
    found = serving.compare_prompts(sample, given.server)
    assert found.verdict == "equal"
    assert "2 turns of 1 rows; 1 rows that spell special tokens" in found.how


def test_a_stop_token_that_the_saved_model_does_not_know_is_seen(
    given: Given, tmp_path: Path
) -> None:
    assert serving.check_stops(given.sample, given.server).verdict == "equal"
    for file in given.straight.folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1]}', encoding="utf-8")
    found = serving.check_stops(given.sample, Server(tmp_path, trust=False))
    assert (found.verdict, found.differences) == ("differs", {"cases": 12.0})
    assert "rows.jsonl:1: the last target is token 3" in found.why


def _disturb(file: Path) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, file, {"format": "pt"})


def test_a_saved_weight_that_is_not_the_trained_one_is_seen(given: Given) -> None:
    file = given.straight.folder / "model.safetensors"
    right = file.read_bytes()
    assert runs.compare_saved(given.straight, given.examples).verdict == "equal"
    _disturb(file)
    found = runs.compare_saved(given.straight, given.examples)
    file.write_bytes(right)
    assert found.verdict == "differs"


def test_a_merged_adapter_that_is_another_is_seen(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = given.run("adapted", Adapter(method="lora", rank=4))
    assert runs.compare_saved(adapted, given.examples).verdict == "equal"
    assert runs.compare_merged(adapted, given.examples).verdict == "equal"

    export = runs.export

    def careless(folder: Path, target: Path, *arguments: Any, **named: Any) -> Any:
        moved = export(folder, target, *arguments, **named)
        _disturb(target / "model.safetensors")
        return moved

    monkeypatch.setattr(runs, "export", careless)
    assert runs.compare_merged(adapted, given.examples).verdict == "differs"


def test_plain_text_has_no_prompts(given: Given, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "Once upon a time."}\n', encoding="utf-8")
    config = given.config().model_copy(
        update={"data": given.config().data.model_copy(update={"train": str(path)})}
    )
    sample = take_sample(config, tmp_path, 3, 128)
    found = [
        serving.compare_prompts(sample, given.server),
        serving.check_stops(sample, given.server),
    ]
    assert {finding.verdict for finding in found} == {"not applicable"}


@pytest.fixture
def verb(given: Given, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The verb on the model and rows; two ranks are one, so that it takes a second."""
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def one(config: Config) -> str:
        runs.run_through(config)
        return ""

    monkeypatch.setattr(runs, "_run_two_ranks", one)

    def call(*arguments: str) -> int:
        common = ["runtime.device=cpu", "runtime.threads=1"]
        return cli.main(["verify", given.model, str(given.data), *common, *arguments])

    return call


def test_the_verb_prints_a_table_and_leaves_nothing_behind(
    verb: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("rows=6", "json=table.json") == 0
    out = capsys.readouterr()
    assert "11 properties in" in out.out
    assert "all of it will take about" in out.err
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["verdict"] for row in table] == ["equal"] * 11
    assert all(row["differences"].keys() == row["limits"].keys() for row in table)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_the_verb_ends_with_1_where_something_differs(
    verb: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [
        compared("any order", "how", {"loss": 1e-9}, {"loss": 1e-5}),
        compared("any pack size", "how", {"loss": 1e-3}, {"loss": 1e-5}),
        does_not_apply("1 = 2 ranks", "how", "there is one GPU"),
    ]
    monkeypatch.setattr(verify_verb, "verify", lambda *_: iter(findings))
    assert verb("rows=6") == 1
    out = capsys.readouterr().out
    assert "differs: any pack size: loss 0.001\n" in out
    assert "there is one GPU" in out
    assert "3 properties in 0 s; 1 differ" in out


@pytest.mark.slow
def test_the_folder_of_an_adapter_is_verified_with_its_base(
    given: Given, verb: Callable[..., int], tmp_path: Path
) -> None:
    adapted = given.run("adapted-2", Adapter(method="lora", rank=4))
    arguments = [str(adapted.folder), str(given.data), "rows=6", "json=adapter.json"]
    assert cli.main(["verify", *arguments, "runtime.device=cpu", "runtime.threads=1"]) == 0
    table = json.loads((tmp_path / "adapter.json").read_text())
    how = {row["what"]: row["how"] for row in table}
    assert how["resumed = uninterrupted"].endswith("(a lora)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/where", "DATA"], "/no/where"),
        (["MODEL", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["MODEL"], "no rows are named"),
        ([], "model: missing"),
        (["MODEL", "DATA", "rows=0"], "sftx verify: rows='0': expected a whole number"),
        (["MODEL", "DATA", "tokens=x"], "sftx verify: tokens='x'"),
        (["MODEL", "DATA", "only=llama"], "only= belongs to `sftx verify families`"),
        (["MODEL", "DATA", "model.add_tokens=[x]"], "verify the folder of the run"),
        (["MODEL", "bad.jsonl"], "bad.jsonl:2: "),
        (["families", "only=lama"], "did you mean llama"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str],
    message: str,
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('["a", "b"]\n["a"]\n', encoding="utf-8")
    names = {"MODEL": given.model, "DATA": str(given.data)}
    assert cli.main(["verify", *(names.get(one, one) for one in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_number_that_is_none_differs() -> None:
    found = compared("x", "how", {"loss": float("nan")}, {"loss": 1.0})
    assert found.verdict == "differs"
    assert found.largest() == "loss nan"


def test_the_table_of_families() -> None:
    assert {"llama", "llama4"} <= {*names_of(["llama"])} < {*names_of([])}
    found = list(try_families(["gpt2"], shown=False))
    assert [(family.name, family.verdict) for family in found] == [("gpt2", "packed")]
    assert "packed: 1, padded: 0, alone: 0" in summary(found)


def test_a_family_that_is_not_exact_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PackLoss.forward
    monkeypatch.setattr(PackLoss, "forward", lambda self, pack: forward(self, pack) * 1.01)
    monkeypatch.setattr("sftx.verify.families.check_paths", lambda *_, **__: [])
    (family,) = try_families(["gpt2"], shown=False)
    assert family.verdict == "wrong"


def test_what_float32_rounds_is_measured_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PackLoss.forward

    def rounding(self: PackLoss, pack: TensorPack) -> torch.Tensor:
        total = forward(self, pack)
        return total * 1.01 if self.model.dtype == torch.float32 else total

    monkeypatch.setattr(PackLoss, "forward", rounding)
    monkeypatch.setattr("sftx.verify.families.check_paths", lambda *_, **__: [])
    (family,) = try_families(["gpt2"], shown=False)
    assert family.verdict == "packed"
    assert family.why == "measured in float64: float32 rounds gradients by 1.0e-02"
    assert family.gradient is not None
    assert family.gradient < 1e-6


def test_a_family_without_an_answer_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "try_family", lambda name: os._exit(3))
    (family,) = try_families(["gpt2"], shown=False)
    assert (family.verdict, family.why) == ("not tried", "its process ended with 3")

    monkeypatch.setattr(families, "PATIENCE", 0)
    monkeypatch.setattr(families, "try_family", lambda name: time.sleep(60))
    (family,) = try_families(["gpt2"], shown=False)
    assert (family.verdict, family.why) == ("not tried", "more than 240 s")


def test_the_model_of_a_gguf_file_is_read_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family whose settings transformers would not read whole out of such a file."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    source = gguf_files.folder(tmp_path / "source", "Qwen3", head_dim=16)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    file = gguf_files.gguf_of(source, model, tmp_path / "model.gguf", "F32")
    ids = [[5, 9, 20, 31, 7]]
    found = plain_model(str(file), None, False, torch.device("cpu"))
    expected = logits_of(model, ids)
    assert torch.allclose(logits_of(found, ids), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
def test_a_gguf_file_is_verified(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    source = gguf_files.folder(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    file = gguf_files.gguf_of(source, model, tmp_path / "model.gguf", "F32")
    arguments = [str(file), str(given.data), "rows=4", "tokens=64", "data.template=plain"]
    written = f"json={tmp_path / 'found.json'}"
    assert cli.main(["verify", *arguments, written, "runtime.device=cpu", "runtime.threads=1"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert sum(finding["verdict"] == "equal" for finding in found) >= 8
