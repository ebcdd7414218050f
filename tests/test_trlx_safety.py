"""Nothing that was trained is lost, nothing of the user's is deleted, and nothing is trained that
was not meant.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_trlx import SAMPLES, config, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import sftx.compat.trlx as trlx
from sftx.cli.export import run as export
from sftx.compat.trlx.pipeline.offline_pipeline import PromptPipeline, tokenize_dialogue
from sftx.compat.trlx.trainer import register_trainer
from sftx.compat.trlx.trainer.accelerate_sft_trainer import AccelerateSFTTrainer
from sftx.compat.trlx.trainer.record import TrlxRun
from sftx.training import checkpoint
from sftx.training.signals import Stopped
from sftx.training.step import train_step
from sftx.types import UserError

LORA = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "init_lora_weights": True,
}


pytestmark = pytest.mark.usefixtures("no_predictions")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder(tmp_path_factory.mktemp("model"), chat=False)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps_of(folder: Path) -> list[int]:
    return [
        json.loads(line)["step"]
        for line in (folder / "sftx" / "metrics.jsonl").read_text().splitlines()
    ]


# --- an error loses nothing -----------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 3], ids=["on the way", "at the end"])
def test_an_error_in_an_evaluation_loses_no_step(model: str, tmp_path: Path, at: int) -> None:
    calls: list[int] = []

    def metric_fn(**_: Any) -> dict[str, Any]:
        calls.append(len(calls))
        if len(calls) == at + 1:  # the first is before training
            raise ZeroDivisionError("no reward")
        return {"m": [1.0]}

    sections = {"total_steps": 3, "batch_size": 2, "eval_interval": 1}
    with pytest.raises(ZeroDivisionError, match="no reward"):
        trlx.train(
            samples=SAMPLES,
            metric_fn=metric_fn,
            config=config(model, tmp_path / "a", train=sections),
        )
    trlx.train(
        samples=SAMPLES,
        config=config(model, tmp_path / "b", train={**sections, "checkpoint_interval": 1}),
    )
    name = f"checkpoint_{at}"
    assert same(
        weights(tmp_path / "a" / name / "hf_model"), weights(tmp_path / "b" / name / "hf_model")
    )
    assert steps_of(tmp_path / "a") == list(range(1, at + 1))

    resume = {**sections, "resume_from_checkpoint": str(tmp_path / "a" / name)}
    trlx.train(samples=SAMPLES, config=config(model, tmp_path / "a", train=resume))
    last = "checkpoint_3/hf_model"
    assert same(weights(tmp_path / "a" / last), weights(tmp_path / "b" / last))


class Interrupt(BaseException):
    """Something that no `except Exception` catches."""


@pytest.mark.parametrize("where", ["callback", "step", "log"])
def test_any_error_leaves_a_checkpoint(
    model: str,
    tmp_path: Path,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    count = [0]

    def third_time(*_: Any, **__: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise Interrupt

    @register_trainer
    class Failing(AccelerateSFTTrainer):
        pass

    if where == "callback":
        Failing.post_backward_callback = third_time
    elif where == "log":
        write = TrlxRun.write
        monkeypatch.setattr(
            TrlxRun, "write", lambda run, record: (write(run, record), third_time())[0]
        )
    else:
        monkeypatch.setattr(
            "sftx.training.loop.train_step", lambda *given: third_time() or train_step(*given)
        )
    ours = config(model, tmp_path, train={"trainer": "Failing", "total_steps": 5, "batch_size": 2})
    with pytest.raises(Interrupt):
        trlx.train(samples=SAMPLES, config=ours)
    said = capsys.readouterr().err
    done = 3 if where in ("callback", "log") else 2
    folder = tmp_path / f"checkpoint_{done}"
    assert f"Interrupt after step {done}: the model is saved in {folder}" in said
    weights(folder / "hf_model")
    assert checkpoint.newest(folder).step == done  # pyright: ignore[reportOptionalMemberAccess]
    assert steps_of(tmp_path) == list(range(1, done + 1))


def test_an_update_cut_in_two_is_no_state_to_continue_from(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Cut(AccelerateSFTTrainer):
        def post_backward_callback(self) -> None:
            if self.iter_count == 2:
                fail = lambda *_: (_ for _ in ()).throw(Interrupt())  # noqa: E731
                self.job.optimizer.register_step_pre_hook(
                    fail
                )  # after the hook that says an update begins

    register_trainer(Cut)
    with pytest.raises(Interrupt):
        trlx.train(
            samples=SAMPLES,
            config=config(model, tmp_path, train={"trainer": "Cut", "total_steps": 5}),
        )
    assert (
        f"in the midst of step 3: the model as it is then is in {tmp_path / 'interrupted'}"
        in capsys.readouterr().err
    )
    weights(tmp_path / "interrupted" / "hf_model")
    assert checkpoint.newest(tmp_path / "interrupted") is None
    assert not (tmp_path / "checkpoint_3").exists()


def test_a_signal_saves_once(model: str, tmp_path: Path) -> None:
    class Signalled(AccelerateSFTTrainer):
        def post_backward_callback(self) -> None:
            if self.iter_count == 2:
                signal.raise_signal(signal.SIGTERM)

    register_trainer(Signalled)
    with pytest.raises(Stopped) as caught:
        trlx.train(
            samples=SAMPLES,
            config=config(model, tmp_path, train={"trainer": "Signalled", "total_steps": 5}),
        )
    assert caught.value.message == "stopped by signal 15 after step 2, which is saved"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_2", "sftx"]


# --- nothing of the user's is deleted, nothing of another run is taken for this one's -------------


def test_a_folder_of_the_users_is_left_alone(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sftx" / "src").mkdir(parents=True)
    (tmp_path / "sftx" / "src" / "mine.py").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=r"train\.checkpoint_dir: the record of the run would go to sftx, which holds",
    ):
        trlx.train(samples=SAMPLES, config=config(model, Path()))
    (tmp_path / "sftx" / "run.json").write_text(
        '{"status": "finished"}'
    )  # a run, but none of a trlx script
    with pytest.raises(UserError, match=r"train\.checkpoint_dir"):
        trlx.train(samples=SAMPLES, config=config(model, Path()))
    assert (tmp_path / "sftx" / "src" / "mine.py").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sftx"]


def test_a_second_run_begins_its_record_anew_and_deletes_nothing_else(
    model: str, tmp_path: Path
) -> None:
    trlx.train(samples=SAMPLES, config=config(model, tmp_path))
    (tmp_path / "sftx" / "notes.txt").write_text("mine")
    (tmp_path / "step-by-step").mkdir()
    trainer = trlx.train(samples=SAMPLES, config=config(model, tmp_path, train={"total_steps": 2}))
    assert steps_of(tmp_path) == [1, 2]
    assert (tmp_path / "sftx" / "notes.txt").read_text() == "mine"
    trainer.save()  # into the checkpoint folder itself
    trainer.save()
    assert (tmp_path / "step-by-step").is_dir()
    assert (tmp_path / "step-00000002").is_dir()


def test_continuing_keeps_the_earlier_metrics(model: str, tmp_path: Path) -> None:
    sections = {"total_steps": 4, "batch_size": 2, "checkpoint_interval": 2, "eval_interval": 2}
    metric: dict[str, Any] = {"metric_fn": lambda **_: {"m": [1.0]}}
    trlx.train(samples=SAMPLES, config=config(model, tmp_path, train=sections), **metric)
    lines = (tmp_path / "sftx" / "metrics.jsonl").read_text().splitlines()
    before = json.loads((tmp_path / "sftx" / "run.json").read_text())["eval_before"]
    resume = {**sections, "resume_from_checkpoint": str(tmp_path / "checkpoint_2")}
    trlx.train(samples=SAMPLES, config=config(model, tmp_path, train=resume), **metric)
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / "sftx" / "metrics.jsonl").read_text().splitlines()[:2] == lines[:2]
    assert json.loads((tmp_path / "sftx" / "run.json").read_text())["eval_before"] == before


def test_a_state_of_an_earlier_run_is_never_taken_for_this_ones(model: str, tmp_path: Path) -> None:
    rewards = iter([0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 0.0, 0.0])

    def metric_fn(**_: Any) -> dict[str, Any]:
        return {"reward": [next(rewards)]}

    sections = {"total_steps": 3, "batch_size": 2, "eval_interval": 1}
    trlx.train(samples=SAMPLES, metric_fn=metric_fn, config=config(model, tmp_path, train=sections))
    others = [["x", "yyy"], ["zz", "y"], ["x", "z"], ["zzz", "x"]]
    trainer = trlx.train(
        samples=others, metric_fn=metric_fn, config=config(model, tmp_path, train=sections)
    )
    fresh = trlx.train(samples=others, config=config(model, tmp_path / "fresh", train=sections))
    assert same(trainer.model.state_dict(), fresh.model.state_dict())
    for name, step in (
        ("checkpoint_3", 3),
        ("best_checkpoint", 1),
    ):  # the second run was best after its first step
        state = checkpoint.newest(tmp_path / name)
        assert state is not None
        assert (state.step, state.plan) == (step, fresh.job.plan.fingerprint)
        trainer.load(str(tmp_path / name))
        assert same(
            weights(tmp_path / name / "hf_model"),
            {k: v.cpu() for k, v in trainer.model.state_dict().items()},
        )


def test_an_adapter_of_an_earlier_run_is_not_loaded_over_a_whole_model(
    model: str, tmp_path: Path
) -> None:
    trlx.train(samples=SAMPLES, config=config(model, tmp_path, model={"peft_config": LORA}))
    trainer = trlx.train(samples=SAMPLES, config=config(model, tmp_path))
    assert same(weights(tmp_path / "checkpoint_3" / "hf_model"), dict(trainer.model.state_dict()))
    assert not (tmp_path / "checkpoint_3" / "hf_model" / "adapter_config.json").exists()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        trainer.save_pretrained(str(tmp_path / "adapter"))


# --- a damaged or hostile model folder ------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("[" * 100_000, "config.json"),
        ('{"model_type": "nothing-known"}', "nothing-known"),
        ('{"model_type": "llama", "hidden_size": "abc"}', "hidden_size"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000}', "num_hidden_layers"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}', "trust_remote_code"),
    ],
    ids=["cut", "unknown", "text", "huge", "code"],
)
def test_a_damaged_model_is_refused_where_the_adapter_asks_for_its_type(
    model: str, tmp_path: Path, damage: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for leave to run code"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(damage)
    (tmp_path / "model" / "code.py").write_text("raise SystemExit('it ran')")
    peft = {"peft_type": "LORA", "r": 4}
    ours = config(model, tmp_path / "run", model={"peft_config": peft})
    ours.model.model_path = str(tmp_path / "model")
    with pytest.raises(UserError, match=said):
        trlx.train(samples=SAMPLES, config=ours)


# --- the tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_pad_token_is_set_only_where_there_is_none(
    model: str, tmp_path: Path, pad: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ours = config(
        model, tmp_path / "run", tokenizer={"tokenizer_path": str(tmp_path / "tokenizer")}
    )
    trainer = trlx.train(samples=SAMPLES, config=ours)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint_3" / "hf_model")
    assert saved.pad_token == trainer.tokenizer.pad_token == (pad or "<eos>")
    ended = [*trainer.tokenizer("Q a").input_ids, saved.eos_token_id, saved.pad_token_id]
    assert trainer.decode([ended[:2]], [ended], append_eos_token=True)[2] == ["a<eos>"]


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}],
            r"samples\[0\]: found a dictionary \(prompt, completion\)",
        ),
        ([["a", "b"], {"prompt": "a", "completion": "b"}], r"samples\[1\]: found a dictionary"),
        (
            ["a text", ["a", "b"]],
            r"samples\[1\]: found list where the first sample is a text.*bos_token",
        ),
        (["a text", {"prompt": "a"}], r"samples\[1\]: found dict"),
        (["a text", None], r"samples\[1\]: found NoneType"),
        ([["a", "b"], ["a", 1]], r"samples\[1\]: a phrase of a dialogue must be a text; found int"),
        (
            [["a", "b"], [["a", "b"], ["c", "d"]]],
            r"samples\[1\]: a phrase of a dialogue must be a text; found list",
        ),
        ([["a", "b"], 7], r"samples\[1\]: found int"),
        ([["a", "b"], ["a"]], r"samples\[1\]: Dialogue must have an even number"),
        ("a text", "a list of them"),
    ],
)
def test_samples_that_would_be_trained_otherwise_than_meant(
    model: str, tmp_path: Path, samples: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trlx.train(samples=samples, config=config(model, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_dictionaries_are_no_dialogues_anywhere() -> None:
    tokenizer = tiny.tokenizer(chat=False)
    with pytest.raises(UserError, match="dictionary"):
        tokenize_dialogue({"prompt": "a", "completion": "b"}, tokenizer)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"prompts\[1\]"):
        PromptPipeline(["a", ["b", "c"]], 9, tokenizer)
    with pytest.raises(UserError, match=r"prompts\[0\]"):
        PromptPipeline([{"question": "b"}], 9, tokenizer)


@pytest.mark.parametrize(
    "name", ["loss", "create_train_dataloader", "prepare_learning", "get_arch", "generate_eval"]
)
def test_methods_that_nothing_would_call_are_refused(model: str, tmp_path: Path, name: str) -> None:
    own = type("Own", (AccelerateSFTTrainer,), {name: lambda self: None})
    register_trainer("own")(own)
    with pytest.raises(UserError, match=rf"Own\.{name}: "):
        trlx.train(samples=SAMPLES, config=config(model, tmp_path, train={"trainer": "own"}))


def test_a_stores_own_loader_is_said_not_to_be_called(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Store(trlx.pipeline.offline_pipeline.DialogStore):
        def create_loader(self, batch_size: int, **_: Any) -> Any:
            raise AssertionError

    class WithStore(AccelerateSFTTrainer):
        def make_experience(self, samples: Any, seq_length: int) -> None:
            self.store = Store(
                [tokenize_dialogue(sample, self.tokenizer) for sample in samples], self.tokenizer
            )

    register_trainer(WithStore)
    trlx.train(samples=SAMPLES, config=config(model, tmp_path, train={"trainer": "WithStore"}))
    assert "Store.create_loader is not called" in capsys.readouterr().err


def test_brackets_in_a_text_are_no_markup(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trlx.train(
        samples=SAMPLES,
        eval_prompts=["a[/b]"],
        metric_fn=lambda **_: {"[/m]": [1.5]},
        config=config(model, tmp_path),
    )
    shown = capsys.readouterr().out
    assert "a[/b]" in shown
    assert "metrics/[/m]: 1.5" in shown


# --- options of saving ----------------------------------------------------------------------------


def test_options_of_saving_apply_or_are_refused_once_all_is_written(
    model: str, tmp_path: Path
) -> None:
    trainer = trlx.train(samples=SAMPLES, config=config(model, tmp_path))
    trainer.save_pretrained(str(tmp_path / "a"), safe_serialization=True, max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    assert same(weights(tmp_path / "a"), weights(tmp_path / "checkpoint_3" / "hf_model"))
    for options in ({"safe_serialization": False}, {"push_to_hub": True}, {"heads_only": True}):
        folder = tmp_path / str(next(iter(options)))
        with pytest.raises(
            UserError, match=rf"save_pretrained: {folder} is written, but {folder.name}="
        ):
            trainer.save_pretrained(str(folder), **options)
        assert same(weights(folder), weights(tmp_path / "a"))
    with pytest.raises(UserError, match=r"save: .* is written, but strange=1"):
        trainer.save(str(tmp_path / "state"), strange=1)
    assert checkpoint.newest(tmp_path / "state") is not None


# --- what comes after -----------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "adapter"])
def test_export_takes_its_runs(model: str, tmp_path: Path, peft: Any) -> None:
    sections: dict[str, Any] = {"train": {"total_steps": 12, "checkpoint_interval": 8}}
    ours = config(
        model,
        tmp_path / "run",
        model={"peft_config": peft},
        optimizer={"kwargs": {"lr": 1e-2}},
        **sections,
    )
    trainer = trlx.train(samples=SAMPLES, config=ours)
    assert export(str(tmp_path / "run"), str(tmp_path / "merged")) == 0
    assert export(str(tmp_path / "run" / "sftx"), str(tmp_path / "earlier"), step="8") == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    for name, step in (("merged", 12), ("earlier", 8)):
        trainer.load(str(tmp_path / "run" / f"checkpoint_{step:02d}"))
        # As a preference trainer takes it by name: the architecture in config.json, its weights in
        # the folder.
        served = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert not (tmp_path / name / "adapter_config.json").exists()
        trainer.job.loss.use_segments(False)
        assert torch.allclose(
            served(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits, atol=1e-5
        )
        assert AutoTokenizer.from_pretrained(tmp_path / name).eos_token == "<eos>"
    with pytest.raises(UserError, match=r"no checkpoint of step 9.*8, 12"):
        export(str(tmp_path / "run"), str(tmp_path / "x"), step="9")
