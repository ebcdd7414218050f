"""The recipe for several processes in docs/migrating-from-trlx.md: the same training, and metric_fn
on its result.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trlx import SAMPLES, TEXTS, config, weights

import sftx
import sftx.compat.trlx as trlx
from sftx.compat.trlx.pipeline.offline_pipeline import PromptPipeline, tokenize_dialogue
from sftx.data.encode_row import encode
from sftx.settings.load import load_config

PAGE = (Path(__file__).parents[1] / "docs" / "migrating-from-trlx.md").read_text(encoding="utf-8")
RECIPE = PAGE.partition("## Several processes")[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder(tmp_path_factory.mktemp("model"), chat=False, max_position_embeddings=1024)


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}[^\n]*\n(.*?)```", RECIPE, re.DOTALL)[number]


@pytest.mark.parametrize("samples", [SAMPLES, TEXTS], ids=["dialogues", "texts"])
def test_the_recipe_trains_what_the_script_trains(
    model: str, tmp_path: Path, samples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftx.training.build.seconds_of", lambda *_: None, raising=False)
    monkeypatch.chdir(tmp_path)
    lists = [
        ["", sample] if isinstance(sample, str) and samples is SAMPLES else sample
        for sample in samples
    ]
    exec(block("python"), {"json": json, "samples": lists})
    (tmp_path / "run.yaml").write_text(block("yaml"))
    ours = config(
        model,
        tmp_path / "ckpts",
        train={
            "total_steps": 3,
            "batch_size": 8,
            "seq_length": 1024,
            "eval_interval": 100,
            "checkpoint_interval": 100,
        },
        tokenizer={"truncation_side": "right"},
    )
    more = [
        f"data.cache={tmp_path / 'cache'}",
        "data.format=segments" if samples is TEXTS else "data.format=dialogue",
    ]
    sftx.train(
        load_config("run.yaml", [f"model={model}", "batch.steps=3", "data.workers=0", *more])
    )
    trlx.train(samples=samples, config=ours)
    theirs, native = (
        weights(tmp_path / "ckpts" / "checkpoint_3" / "hf_model"),
        weights(tmp_path / "runs" / "sft"),
    )
    assert all(torch.equal(theirs[name], native[name]) for name in theirs)

    seen: list[list[str]] = []

    def metric_fn(prompts: list[str], **_: Any) -> dict[str, Any]:
        seen.append(prompts)
        return {"m": [1.0]}

    names: dict[str, Any] = {
        "trlx": trlx,
        "samples": samples,
        "eval_prompts": ["ab", "c"],
        "metric_fn": metric_fn,
        "stop_sequences": [],
        "config": ours.evolve(train={"checkpoint_dir": str(tmp_path / "judged")}),
    }
    exec(block("python", 1), names)
    assert seen == [["ab", "c"]]
    assert [path.name for path in (tmp_path / "judged").iterdir()] == [
        "sftx"
    ]  # nothing was trained


texts = st.sampled_from(["a", "ab", "", "é", "x<eos>", "<bos>q", "a longer text"])


@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.sampled_from([4, 6, 9, 64]),
)
@settings(deadline=None, max_examples=150)
def test_dialogues_are_the_same_tokens(
    pairs: list[tuple[str, str]], side: str, length: int
) -> None:
    dialogue = [text for pair in pairs for text in pair]
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.truncation_side = side
    made = tokenize_dialogue(dialogue, tokenizer, length)
    ids = [token for message in made for token in message.tokens]
    trained = [float(message.is_output) for message in made for _ in message.tokens]
    trained[0] = 0.0  # nothing stands before it
    expected = [(ids, trained)] if any(trained) else []
    native = encode(
        dialogue,
        tokenizer,
        template="none",
        special_tokens="allow",
        max_length=length,
        too_long="truncate_left" if side == "left" else "truncate_right",
    )
    assert [(example.ids.tolist(), example.weights.tolist()) for example in native] == expected


@given(
    st.lists(texts.filter(bool), min_size=2, max_size=5),
    st.sampled_from(["left", "right"]),
    st.integers(2, 20),
)
@settings(deadline=None, max_examples=100)
def test_texts_are_the_same_tokens(parts: list[str], side: str, length: int) -> None:
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.truncation_side = side
    row = {"segments": [{"text": "".join(parts), "weight": 1}]}
    (native,) = encode(
        row,
        tokenizer,
        special_tokens="allow",
        max_length=length,
        too_long="truncate_left" if side == "left" else "truncate_right",
    )
    expected = PromptPipeline(["".join(parts)], length, tokenizer)[0]["input_ids"]
    assert native.ids.tolist() == expected
    assert native.weights.tolist() == [0.0] + [1.0] * (len(expected) - 1)
