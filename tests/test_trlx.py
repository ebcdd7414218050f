"""trlx's interface: the same tokens, the same meanings, its defects mended."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import sftx.compat.trlx as trlx
from sftx.compat.trlx import translate
from sftx.compat.trlx.data.configs import OptimizerConfig, SchedulerConfig, TRLConfig
from sftx.compat.trlx.data.default_configs import default_sft_config
from sftx.compat.trlx.data.method_configs import MethodConfig, get_method, register_method
from sftx.compat.trlx.pipeline import BaseRolloutStore, MiniBatchIterator, register_datapipeline
from sftx.compat.trlx.pipeline.offline_pipeline import (
    DialogMessage,
    DialogStore,
    PromptPipeline,
    tokenize_dialogue,
)
from sftx.compat.trlx.trainer import register_trainer
from sftx.compat.trlx.trainer.accelerate_sft_trainer import AccelerateSFTTrainer, SFTConfig
from sftx.compat.trlx.utils.loading import get_pipeline, get_trainer
from sftx.training import checkpoint
from sftx.types import UserError

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
STORIES = SHARED / "models" / "stories260K"


pytestmark = pytest.mark.usefixtures("no_predictions")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder(tmp_path_factory.mktemp("model"), chat=False)


def config(path: str, folder: Path, **sections: dict[str, Any]) -> TRLConfig:
    """A short run without a tracker."""
    base = default_sft_config().evolve(
        train={
            "total_steps": 3,
            "batch_size": 4,
            "seq_length": 96,
            "eval_interval": 100,
            "tracker": None,
            "checkpoint_dir": str(folder),
        },
        model={"model_path": path},
        tokenizer={"tokenizer_path": path},
        method={"gen_kwargs": {"max_new_tokens": 4, "do_sample": False}},
    )
    return base.evolve(**sections)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


# --- tokens ---------------------------------------------------------------------------------------

texts = st.text(alphabet="ab é\n", max_size=8)
tokenizers = {"byte": tiny.tokenizer(chat=False), "no_bos": tiny.tokenizer(chat=False)}
tokenizers["no_bos"].bos_token = None
if STORIES.exists():
    tokenizers["stories"] = AutoTokenizer.from_pretrained(STORIES)


@given(
    phrases=st.lists(st.tuples(texts, texts), min_size=1, max_size=4) | texts,
    side=st.sampled_from(["left", "right"]),
    max_length=st.integers(1, 40),
    name=st.sampled_from(sorted(tokenizers)),
)
@settings(deadline=None, max_examples=200)
def test_tokenize_dialogue_is_a_cut_of_the_whole(
    phrases: Any, side: str, max_length: int, name: str
) -> None:
    tokenizer = tokenizers[name]
    tokenizer.truncation_side = side
    start = str(tokenizer.bos_token or tokenizer.eos_token)
    dialogue = phrases if isinstance(phrases, str) else [text for pair in phrases for text in pair]
    whole = [start, dialogue] if isinstance(dialogue, str) else list(dialogue)
    whole[-1] += str(tokenizer.eos_token)
    flat = [
        (token, i % 2 == 1)
        for i, text in enumerate(whole)
        for token in tokenizer(text, add_special_tokens=False).input_ids
    ]
    flat = flat[-max_length:] if side == "left" else flat[:max_length]
    if flat[0][1]:
        room = flat if len(flat) < max_length else flat[1:] if side == "left" else flat[:-1]
        flat = [(tokenizer.convert_tokens_to_ids(start), False), *room]

    messages = tokenize_dialogue(dialogue, tokenizer, max_length)
    assert [(token, m.is_output) for m in messages for token in m.tokens] == flat
    assert len(flat) <= max_length


def test_tokenize_dialogue_by_hand() -> None:
    tokenizer = tiny.tokenizer(chat=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert isinstance(bos, int)
    assert isinstance(eos, int)
    a, b = (tokenizer(letter).input_ids[0] for letter in "ab")
    tokenizer.truncation_side = "right"
    assert tokenize_dialogue("a", tokenizer) == [
        DialogMessage(False, (bos,)),
        DialogMessage(True, (a, eos)),
    ]
    assert tokenize_dialogue(["a", "b<eos>"], tokenizer)[1] == DialogMessage(True, (b, eos))
    assert tokenize_dialogue(["aa", "b"], tokenizer, 3) == [
        DialogMessage(False, (a, a)),
        DialogMessage(True, (b,)),
    ]
    assert tokenize_dialogue(["", "bb"], tokenizer, 3) == [
        DialogMessage(False, (bos,)),
        DialogMessage(True, (b, b)),
    ]
    tokenizer.truncation_side = "left"
    assert tokenize_dialogue(["aa", "bb"], tokenizer, 3) == [
        DialogMessage(False, (bos,)),
        DialogMessage(True, (b, eos)),
    ]
    with pytest.raises(ValueError, match="even number of phrases"):
        tokenize_dialogue(["a", "b", "a"], tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_dialog_store_batches(side: str) -> None:
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.padding_side = side
    tokenizer.pad_token = (
        tokenizer.eos_token
    )  # as the trainer sets it: padding must still never be a target
    store = DialogStore(
        [tokenize_dialogue(d, tokenizer) for d in (["ab", "c"], ["a", "bbb", "c", "d"])], tokenizer
    )
    batch = next(iter(store.create_loader(2)))
    for row in range(len(store)):
        element = store[row]
        real = batch.attention_mask[row].bool()
        assert batch.input_ids[row][real].tolist() == element["input_ids"].tolist()
        assert batch.labels[row][real].tolist() == element["labels"].tolist()
        assert set(batch.labels[row][~real].tolist()) <= {-100}
        assert real.tolist() == sorted(real.tolist(), reverse=side == "right")
    assert store[1]["labels"].tolist().count(-100) == 2


def test_prompt_pipeline(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.padding_side, tokenizer.truncation_side = "left", "left"
    prompts = [{"prompt": "abcdef", "answer": 1}, {"prompt": "x", "answer": 2}]
    pipeline = PromptPipeline(prompts, 4, tokenizer)
    assert prompts[0] == {"prompt": "abcdef", "answer": 1}  # left as it was
    assert tokenizer.decode(pipeline[0]["input_ids"]) == "cdef"
    batch = next(iter(pipeline.create_loader(2)))
    assert batch["answer"] == [1, 2]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    tokenizer.truncation_side = "right"
    assert tokenizer.decode(PromptPipeline(["abcdef"], 4, tokenizer)[0]["input_ids"]) == "abcd"
    with pytest.raises(UserError, match="no room for a prompt"):
        PromptPipeline(["a"], 0, tokenizer)


@given(
    samples=st.lists(texts.filter(bool), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    limit=st.integers(1, 10),
    name=st.sampled_from(sorted(tokenizers)),
)
@settings(deadline=None)
def test_prompts_are_cut_on_their_side(
    samples: list[str], side: str, limit: int, name: str
) -> None:
    tokenizer = tokenizers[name]
    tokenizer.truncation_side = tokenizer.padding_side = side
    whole = [tokenizer(text, add_special_tokens=False).input_ids for text in samples]
    cut = [ids[-limit:] if side == "left" else ids[:limit] for ids in whole]
    pipeline = PromptPipeline(samples, limit, tokenizer)
    assert [prompt["input_ids"] for prompt in pipeline] == cut
    (batch,) = pipeline.create_loader(len(samples))
    for ids, row, mask in zip(cut, batch["input_ids"], batch["attention_mask"], strict=True):
        assert row[mask.bool()].tolist() == ids


def test_minibatches() -> None:
    loader = [
        {"x": torch.arange(8), "y": list("abcdefgh")},
        {"x": torch.arange(3), "y": list("abc")},
    ]
    first, last = MiniBatchIterator(loader, 2, 4)
    assert [mb["x"].tolist() for mb in first] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [mb["y"] for mb in last] == [["a", "b"], ["c"]]
    store = DialogStore([tokenize_dialogue("ab", tokenizers["byte"])] * 4, tokenizers["byte"])
    (batch,) = MiniBatchIterator(store.create_loader(4), 2, 2)
    assert [tuple(mb.input_ids.shape) for mb in batch] == [(2, 4), (2, 4)]


# --- configuration --------------------------------------------------------------------------------


def test_config_round_trips(tmp_path: Path) -> None:
    base = default_sft_config()
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(json.loads(str(base)), sort_keys=False))
    read = TRLConfig.load_yaml(str(path))
    assert read.to_dict() == json.loads(str(base)) == TRLConfig.from_dict(read.to_dict()).to_dict()
    assert isinstance(read.method, SFTConfig)
    base.to_dict()["train"]["batch_size"] = 99
    assert base.train.batch_size == 8


def test_evolve_and_update() -> None:
    base = default_sft_config()
    evolved = base.evolve(train={"batch_size": 4}, method={"gen_kwargs": {"temperature": 0.5}})
    assert (evolved.train.batch_size, evolved.train.seq_length, base.train.batch_size) == (
        4,
        1024,
        8,
    )
    assert evolved.method.gen_kwargs == {**base.method.gen_kwargs, "temperature": 0.5}
    dotted = {
        "train.batch_size": 4,
        "optimizer.kwargs.lr": 1.0,
        "method.gen_kwargs.num_beams": 2,
        "model": {"model_path": "m"},
    }
    updated = TRLConfig.update(base.to_dict(), dotted)
    assert (updated.train.batch_size, updated.optimizer.kwargs["lr"], updated.model.model_path) == (
        4,
        1.0,
        "m",
    )
    assert updated.method.gen_kwargs["num_beams"] == 2
    assert TRLConfig.update(base, {}).to_dict() == base.to_dict()


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.batchsize", "train.batch_size"),
        ("optimiser.name", "did you mean optimizer"),
        ("lr", "known sections"),
        ("model.model_pth", "model.model_path"),
        ("method.gen_kwarg", "method.gen_kwargs"),
    ],
)
def test_typos_raise_at_every_depth(key: str, hint: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"is not present in the config \(typo or a wrong config\).*"
        + hint.replace(".", r"\."),
    ):
        TRLConfig.update(default_sft_config(), {key: 1})


def test_registries() -> None:
    @register_method
    class Mine(MethodConfig):
        pass

    @register_method("renamed")
    class Other(MethodConfig):
        pass

    assert get_method("MINE") is Mine
    assert get_method("Renamed") is Other
    assert get_trainer("acceleratesfttrainer") is AccelerateSFTTrainer
    assert get_pipeline("PromptPipeline") is PromptPipeline
    register_trainer("mine")(AccelerateSFTTrainer)
    register_datapipeline("mine")(PromptPipeline)
    assert (get_trainer("Mine"), get_pipeline("Mine")) == (AccelerateSFTTrainer, PromptPipeline)
    for get in (get_method, get_trainer, get_pipeline):
        with pytest.raises(UserError, match="has not been registered"):
            get("nothing")


@pytest.mark.parametrize("argument", ["reward_fn", "rewards", "dataset", "prompts"])
def test_reinforcement_learning_is_refused_in_one_sentence(argument: str) -> None:
    wrong: dict[str, Any] = {argument: [1.0]}
    with pytest.raises(
        UserError, match=r"supervised fine-tuning, not reinforcement learning.*save_pretrained"
    ):
        trlx.train(samples=["a"], **wrong)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"model_arch_type": "seq2seq"}}, "model.model_arch_type"),
        ({"model": {"delta_kwargs": {"delta_type": "lora"}}}, "model.delta_kwargs"),
        ({"model": {"peft_config": {"peft_type": "PREFIX_TUNING"}}}, "PREFIX_TUNING"),
        ({"model": {"peft_config": {"peft_type": "LORA", "bias": "all"}}}, "bias='all'"),
        ({"model": {"peft_config": {"peft_type": "LORA"}, "num_layers_unfrozen": 1}},
         "num_layers_unfrozen"),
        ({"model": {"num_layers_unfrozen": 9}}, "has 2 layers"),
        ({"model": {"model_extra_configs": {"attn": 1}}}, "model_extra_configs"),
        ({"train": {"minibatch_size": 3}}, "must divide"),
        ({"train": {"tracker": "mlflow"}}, "train.tracker"),
        ({"optimizer": {"name": "adamw_8bit_bnb"}}, "use adamw"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name"),
        ({"optimizer": {"kwargs": {"betaz": 1}}}, "betaz"),
        ({"scheduler": {"name": "cosine"}}, "scheduler.name"),
        ({"scheduler": {"kwargs": {"t_max": 1}}}, "t_max"),
        ({"train": {"seq_length": 4}}, "no room for a prompt"),
        ({"method": {"gen_kwargs": {"num_return_sequences": 2}}}, "num_return_sequences"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_refused(
    model: str, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trlx.train(samples=[["a", "b"]] * 4, config=config(model, tmp_path, **sections))


# --- mathematics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cosine_annealing", {"T_max": 7, "eta_min": 1e-4}),
        ("cosine_annealing", {"T_max": 1e12, "eta_min": 1e-3}),
        ("linear", {}),
        ("linear", {"start_factor": 1.0, "end_factor": 0.1, "total_iters": 8}),
    ],
)
def test_schedules_are_torchs(name: str, kwargs: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = {
        "cosine_annealing": torch.optim.lr_scheduler.CosineAnnealingLR,
        "linear": torch.optim.lr_scheduler.LinearLR,
    }
    scheduler = theirs[name](optimizer, **kwargs)
    rate = translate.learning_rate(SchedulerConfig(name, kwargs), 1e-3)
    for step in range(12):
        assert rate(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


SAMPLES: list[Any] = [
    ["ab", "c"],
    ["a", "bbbbbb", "cd", "e"],
    "text",
    ["xyz", "wwww"],
    ["q", "r s t"],
    ["", "u"],
]


TEXTS: list[Any] = ["a text", "another, longer text", "third", "the fourth"]


@pytest.mark.parametrize(
    ("samples", "minibatch", "optimizer"),
    [
        (SAMPLES, None, "adamw"),
        (SAMPLES, 1, "adamw"),
        (TEXTS, 1, "adamw"),
        (SAMPLES, None, "adam"),
        (TEXTS, None, "sgd"),
    ],
    ids=["dialogue", "minibatches", "text", "adam", "sgd"],
)
def test_training_equals_a_naive_loop(
    model: str, tmp_path: Path, samples: Any, minibatch: int | None, optimizer: str
) -> None:
    kwargs = (
        {"lr": 1e-2, "weight_decay": 0.1}
        if optimizer == "sgd"
        else {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}
    )
    ours = config(
        model,
        tmp_path,
        train={"batch_size": 2, "minibatch_size": minibatch, "epochs": 3, "total_steps": 5},
        scheduler={"name": "linear", "kwargs": {"total_iters": 4}},
    )
    ours.optimizer = OptimizerConfig(optimizer, kwargs)
    ours.scheduler.kwargs = {"total_iters": 4}
    trainer = trlx.train(samples=samples, config=ours)
    plan = trainer.job.plan
    assert plan.num_steps == 5
    assert len(
        set(np.concatenate([plan.examples(step) for step in range(len(samples) // 2)]).tolist())
    ) == len(samples)

    reference = AutoModelForCausalLM.from_pretrained(model).double()
    decayed = [p for n, p in reference.named_parameters() if p.ndim >= 2 and "embed" not in n]
    rest = [p for p in reference.parameters() if not any(p is q for q in decayed)]
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    optim = kind([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], **kwargs)
    schedule = torch.optim.lr_scheduler.LinearLR(optim, total_iters=4)
    for step in range(plan.num_steps):
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for i in plan.examples(step):
            element = trainer.store[int(i)]
            ids = torch.as_tensor(element["input_ids"])[None]
            labels = torch.as_tensor(element.get("labels", element["input_ids"]))
            logits = reference(input_ids=ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits, labels[1:], ignore_index=-100, reduction="sum"
            )
            count += int((labels[1:] != -100).sum())
        (total / count).backward()
        optim.step()
        optim.zero_grad()
        schedule.step()
    trained = dict(trainer.model.named_parameters())
    for name, parameter in reference.named_parameters():
        assert torch.allclose(trained[name].double(), parameter, atol=2e-5), name


def test_resume_continues_at_the_step(model: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "train": {"total_steps": 6, "batch_size": 2, "checkpoint_interval": 2},
        "scheduler": {"kwargs": {"T_max": 6, "eta_min": 0.0}},
    }
    whole = trlx.train(samples=SAMPLES, config=config(model, tmp_path / "whole", **sections))
    again = config(model, tmp_path / "again", **sections)
    resumed = trlx.train(
        samples=SAMPLES,
        config=again.evolve(
            train={"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint_2")}
        ),
    )
    records = [
        json.loads(line)
        for line in (tmp_path / "again" / "sftx" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == [3, 4, 5, 6]
    assert resumed.iter_count == whole.iter_count == 6
    first, second = (
        weights(tmp_path / "whole" / "checkpoint_6" / "hf_model"),
        weights(tmp_path / "again" / "checkpoint_6" / "hf_model"),
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_num_layers_unfrozen(model: str, tmp_path: Path) -> None:
    before = weights(Path(model))
    trlx.train(samples=SAMPLES, config=config(model, tmp_path, model={"num_layers_unfrozen": 1}))
    after = weights(tmp_path / "checkpoint_3" / "hf_model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("model.layers.1.", "model.norm.")) for name in changed)


def test_peft_as_dictionary_and_as_object(model: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, TaskType

    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    as_dict = config(
        model,
        tmp_path / "a",
        model={"peft_config": {"peft_type": "LORA", "task_type": "CAUSAL_LM", **given}},
    )
    as_object = config(model, tmp_path / "b")
    as_object.model.peft_config = LoraConfig(task_type=TaskType.CAUSAL_LM, **given)
    states = []
    for each in (as_dict, as_object):
        trainer = trlx.train(samples=SAMPLES, config=each)
        assert isinstance(trainer.model, PeftModel)
        saved = (
            Path(each.train.checkpoint_dir)
            / "checkpoint_3"
            / "hf_model"
            / "adapter_model.safetensors"
        )
        states.append(saved.read_bytes())
    assert states[0] == states[1]
    assert len(trainer.generate(torch.tensor([[5, 6]]))[0]) <= 6


def test_dora_with_the_scale_of_rslora_is_both(model: str, tmp_path: Path) -> None:
    """peft scales by alpha / sqrt(r) then; a DoRA alone would be scaled by alpha / r."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    both = {**given, "use_dora": True, "use_rslora": True}
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**both))
    layers = [layer for layer in theirs.modules() if hasattr(layer, "lora_magnitude_vector")]
    assert layers[0].scaling == {"default": 4.0}
    asked = config(model, tmp_path, model={"peft_config": {"peft_type": "LORA", **both}})
    adapter: Any = translate._adapter(asked)
    assert (adapter["method"], adapter["alpha"] / adapter["rank"]) == ("dora", 4.0)


# --- evaluation and saving ------------------------------------------------------------------------


def test_evaluation_layout_and_best_checkpoint(model: str, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def metric_fn(
        samples: list[str], prompts: list[str], outputs: list[str], answer: list[int]
    ) -> dict[str, Any]:
        calls.append({"samples": samples, "prompts": prompts, "outputs": outputs, "answer": answer})
        return {"reward": [[3, 5, 4][len(calls) // 2 % 3]] * len(samples), "total": 7.0}

    ours = config(
        model, tmp_path, train={"total_steps": 10, "eval_interval": 5, "checkpoint_interval": 4},
        method={"gen_kwargs": {"max_new_tokens": [2, 3]}},
    )  # fmt: skip
    trainer = trlx.train(
        samples=SAMPLES,
        eval_prompts=[{"prompt": "ab", "answer": 1}, {"prompt": "c", "answer": 2}] * 3,
        metric_fn=metric_fn,
        config=ours,
    )
    assert len(calls) == 6  # before, at 5 and at 10, twice each
    assert calls[0]["answer"] == [1, 2] * 3
    assert calls[0]["prompts"] == ["ab", "c"] * 3
    assert [p + o for p, o in zip(calls[0]["prompts"], calls[0]["outputs"], strict=True)] == calls[
        0
    ]["samples"]
    folders = {path.name for path in tmp_path.iterdir()}
    assert folders == {
        "checkpoint_04",
        "checkpoint_08",
        "checkpoint_10",
        "sftx",
    }  # a sweep has no single reward
    stats = trainer.evaluate()
    assert set(stats) == {
        f"metrics/{m}@max_new_tokens={n}" for m in ("reward", "total") for n in (2, 3)
    } | {"time/generate"}


def test_answers_are_kept_with_the_run_and_are_what_generate_gives(
    model: str, tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def metric_fn(outputs: list[str], **_: Any) -> dict[str, Any]:
        seen.append(outputs)
        return {"length": [float(len(output)) for output in outputs], "total": 1.0}

    bans = {"suppress_tokens": list(range(40, 60)), "max_new_tokens": [3, 6]}
    ours = config(model, tmp_path, method={"gen_kwargs": bans})
    asked = ["a", "a longer prompt", "ab"]
    trainer = trlx.train(
        samples=SAMPLES, eval_prompts=asked, metric_fn=metric_fn, config=ours, stop_sequences=["x"]
    )
    lines = [json.loads(line) for line in (tmp_path / "sftx" / "samples.jsonl").open()]
    keys = [(line["step"], line["max_new_tokens"], line["prompt"]) for line in lines]
    assert keys == [(step, n, prompt) for step in (0, 3) for n in (3, 6) for prompt in asked]
    assert [line["output"] for line in lines] == [output for outputs in seen for output in outputs]
    assert [line["scores"] for line in lines] == [{"length": len(each["output"])} for each in lines]
    for line in lines[-3:]:
        ids = trainer.tokenizer(line["prompt"], return_tensors="pt").input_ids
        (whole,) = trainer.generate(ids, max_new_tokens=6).tolist()
        assert trainer.decode(ids.tolist(), [whole])[2] == [line["output"]]
        assert len(whole) - ids.shape[1] == line["tokens"]


def test_a_resumed_run_remembers_the_best(model: str, tmp_path: Path) -> None:
    rewards = iter([0.0, 5.0, 1.0, 2.0, 3.0, 2.0, 3.0])
    given: dict[str, Any] = {
        "samples": SAMPLES,
        "metric_fn": lambda samples, prompts, outputs: {"reward": [next(rewards)]},
    }
    train: dict[str, Any] = {
        "total_steps": 4,
        "batch_size": 2,
        "eval_interval": 1,
        "checkpoint_interval": 2,
    }
    trlx.train(**given, config=config(model, tmp_path, train=train))
    train["resume_from_checkpoint"] = str(tmp_path / "checkpoint_2")
    trlx.train(**given, config=config(model, tmp_path, train=train))
    best = checkpoint.newest(tmp_path / "best_checkpoint")
    assert best is not None
    assert best.step == 1


def test_default_prompts_and_the_default_tracker(model: str, tmp_path: Path) -> None:
    ours = config(model, tmp_path, train={"tracker": "wandb", "total_steps": 1})
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed, and would be used")
    with pytest.warns(UserWarning, match="wandb.*not installed"):
        trainer = trlx.train(samples=SAMPLES, config=ours)
    assert [prompt["input_ids"] for prompt in trainer.eval_pipeline] == [
        [trainer.tokenizer.bos_token_id]
    ] * 4


def test_numbers_reach_the_tracker(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    started: dict[str, Any] = {}

    class Run:
        def finish(self, exit_code: int) -> None:
            logged.append((-1, {}))

        def log(self, numbers: dict[str, Any], step: int) -> None:
            logged.append((step, numbers))

    wandb: Any = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda **given: started.update(given) or Run()
    wandb.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train = {
        "tracker": "wandb",
        "total_steps": 2,
        "project_name": "p",
        "group_name": "g",
        "tags": ["t"],
    }
    trlx.train(
        samples=SAMPLES,
        config=config(model, tmp_path, train=train),
        metric_fn=lambda **_: {"m": [1.0]},
    )
    assert (started["project"], started["group"], started["tags"]) == ("p", "g", ["t"])
    assert [step for step, _ in logged] == [0, 1, 2, -1]
    assert {"loss", "learning_rate_group_0", "metrics/m", "samples"} <= set(logged[2][1])
    assert "metrics/m" not in logged[1][1]


def test_save_best_follows_the_reward(model: str, tmp_path: Path) -> None:
    rewards = iter([0.0, 1.0, 3.0, 2.0])
    trlx.train(
        samples=SAMPLES,
        metric_fn=lambda samples, prompts, outputs: {"reward": [next(rewards)]},
        config=config(
            model, tmp_path, train={"total_steps": 3, "eval_interval": 1, "checkpoint_interval": 2}
        ),
    )
    best, second = (
        weights(tmp_path / "best_checkpoint" / "hf_model"),
        weights(tmp_path / "checkpoint_2" / "hf_model"),
    )
    assert all(torch.equal(best[name], second[name]) for name in best)
    evals = [
        json.loads(line)["eval"]
        for line in (tmp_path / "sftx" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [e["metrics/reward"] for e in evals] == [1.0, 3.0, 2.0]


def test_saved_model_is_the_one_in_memory_and_load_puts_it_back(model: str, tmp_path: Path) -> None:
    trainer = trlx.train(
        samples=SAMPLES, config=config(model, tmp_path, train={"save_optimizer": False})
    )
    trainer.save_pretrained(str(tmp_path / "out"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = saved(input_ids=ids).logits
    assert torch.allclose(trainer.model(input_ids=ids).logits, expected, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == trainer.tokenizer.eos_token
    trainer.save(str(tmp_path / "state"))
    with torch.no_grad():
        next(trainer.model.parameters()).zero_()
    trainer.load(str(tmp_path / "state"))
    assert torch.allclose(trainer.model(input_ids=ids).logits, expected, atol=1e-6)
    with pytest.raises(UserError, match="holds no checkpoint"):
        trainer.load(str(tmp_path / "out"))


def test_decode_cuts_at_stop_sequences(model: str, tmp_path: Path) -> None:
    trainer = AccelerateSFTTrainer(config(model, tmp_path), stop_sequences=["Human:", "##"])
    tokenizer = trainer.tokenizer
    prompt = tokenizer("Q ").input_ids
    outputs = {"fine  Human: no ## x": "fine", "a## Human:": "a", "as it is ": "as it is "}
    samples = [prompt + tokenizer(text).input_ids for text in outputs]
    decoded = trainer.decode([prompt] * 3, samples)
    assert decoded == (
        [f"Q {text}" for text in outputs.values()],
        ["Q "] * 3,
        list(outputs.values()),
    )
    assert trainer.decode([prompt], samples[:1], append_eos_token=True)[2] == ["fine<eos>"]
    with pytest.raises(UserError, match="loaded when training begins"):
        trainer.model  # noqa: B018


def test_samples_without_targets_are_counted(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = config(model, tmp_path, train={"seq_length": 8})
    trainer = trlx.train(samples=[["a long prompt", "b"], ["ab", "c"]] * 4, config=ours)
    assert "4 of 8 samples have no target left" in capsys.readouterr().err
    assert len(trainer.job.corpus) == 4
    with pytest.raises(UserError, match="no sample has a target left"):
        trlx.train(samples=[["a long prompt", "b"]], config=ours)


def test_subclasses(model: str, tmp_path: Path) -> None:
    seen: list[str] = []

    @register_trainer
    class Counting(AccelerateSFTTrainer):
        def make_experience(self, samples: Any, seq_length: int) -> None:
            self.store = Store()
            self.store.push([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 4)

        def post_backward_callback(self) -> None:
            seen.append("step")

        def post_epoch_callback(self) -> None:
            seen.append("epoch")

    class Store(BaseRolloutStore):
        pass

    ours = config(model, tmp_path, train={"trainer": "Counting", "batch_size": 2, "total_steps": 4})
    trlx.train(samples=["ignored"], config=ours)
    assert seen == ["step", "step", "epoch", "step", "step", "epoch"]

    @register_trainer
    class OwnLoss(AccelerateSFTTrainer):
        def loss(self, batch: Any) -> Any: ...

    with pytest.raises(UserError, match=r"OwnLoss.loss"):
        trlx.train(samples=["a"], config=ours.evolve(train={"trainer": "OwnLoss"}))


# --- whole scripts --------------------------------------------------------------------------------

SCRIPTS = {
    "alpaca": """
def preprocess(instruction, input, output):
    asked = f"### Instruction:\\n{instruction}\\n\\n### Input:\\n{input}"
    return [f"{asked}\\n\\n### Response:\\n", output]
samples = [preprocess(x["prompt"], "", x["completion"]) for x in rows]
eval_prompts = [sample[0] for sample in samples[:3]]
def metric_fn(samples, **kwargs):
    return {"length": [len(sample.split("### Response:\\n")[1]) for sample in samples]}
stop_sequences = []
""",
    "sentiments": """
samples = [x["prompt"] + " " + x["completion"] for x in rows]
eval_prompts = ["I don't know much about the"] * 4
def metric_fn(samples, prompts, outputs):
    return {"sentiments": torch.tensor([float("happy" in sample) for sample in samples])}
stop_sequences = []
""",
    "hh": """
def turn(text):
    return f"\\n\\nHuman: {text}\\n\\nAssistant: "
samples = [[turn(x["prompt"]), x["completion"], turn("Why?"), "So."] for x in rows]
eval_prompts = [{"prompt": s[0], "original_output": s[1]} for s in samples[:3]]
def metric_fn(samples, prompts, outputs, original_output, **kwargs):
    assert not any("Human:" in output for output in outputs)
    return {"reward": [float(len(a) < len(b)) for a, b in zip(outputs, original_output)]}
config = config.evolve(tokenizer=dict(truncation_side="left"))
stop_sequences = ["Human:", "human:", "Assistant:", "assistant:"]
""",
}
FRAME = """
import json, sys
import torch
import trlx
from trlx.data.default_configs import TRLConfig, default_sft_config
from trlx.pipeline.offline_pipeline import PromptPipeline
import sftx.compat.trlx.pipeline.offline_pipeline as ours
assert PromptPipeline is ours.PromptPipeline
def main(hparams={}):
    config = default_sft_config().evolve(
        train=dict(total_steps=4, batch_size=2, seq_length=192, eval_interval=2,
        checkpoint_interval=3, tracker=None),
        model=dict(model_path=hparams.pop("path")),
        tokenizer=dict(tokenizer_path=hparams.pop("tokenizer")),
        optimizer=dict(kwargs=dict(lr=1e-3)), scheduler=dict(kwargs=dict(eta_min=1e-3)),
        method=dict(gen_kwargs=dict(max_new_tokens=16)),
    )
    rows = [json.loads(line) for line in open(hparams.pop("rows"))][:40]
    config = TRLConfig.update(config.to_dict(), hparams)
    SCRIPT
    trainer = trlx.train(
        samples=samples, eval_prompts=eval_prompts, metric_fn=metric_fn, config=config,
        stop_sequences=stop_sequences
    )
    trainer.save_pretrained("saved")
if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
"""


@pytest.fixture
def run_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str, Path], Path]]:
    """Runs one of the scripts as `__main__`; returns its folder of checkpoints."""

    def run(name: str, model: str, rows: Path) -> Path:
        script = tmp_path / "script.py"
        script.write_text(FRAME.replace("SCRIPT", SCRIPTS[name].strip().replace("\n", "\n    ")))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(
            sys,
            "argv",
            ["script.py", json.dumps({"path": model, "tokenizer": model, "rows": str(rows)})],
        )
        monkeypatch.setitem(sys.modules, "trlx", trlx)
        runpy.run_path(str(script), run_name="__main__")
        AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "saved").values())
        assert (tmp_path / "ckpts" / "checkpoint_4" / "hf_model" / "model.safetensors").exists()
        return tmp_path / "ckpts"

    before = set(sys.modules)
    yield run
    for name in set(sys.modules) - before:
        if name.startswith("trlx."):
            del sys.modules[name]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_run_when_the_import_changes(
    name: str, tmp_path: Path, model: str, run_script: Any
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"{n} plus {n}?", "completion": f"{n} and {n} make {2 * n}."} for n in range(8)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_script(name, model, rows)


@pytest.mark.skipif(not STORIES.exists(), reason="needs the shared data")
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_run_on_real_data(name: str, run_script: Any) -> None:
    record = run_script(name, str(STORIES), SHARED / "tinystories" / "sft_continue.jsonl")
    losses = [
        json.loads(line)["loss"]
        for line in (record / "sftx" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(math.isfinite(loss) for loss in losses)
