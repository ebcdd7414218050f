"""What comes after SFT: answers sampled and trained again, and TRL's trainers on the folder as it is."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from sftx import Tokenizer, encode, train
from sftx.cli import main
from sftx.data.dataset import load_corpora
from sftx.data.encoder import Encoder
from sftx.eval import answer_rows as written
from sftx.eval.generate import Prompt, Sample
from sftx.settings.make import make_config

DOCS = Path(__file__).parents[1] / "docs"
KEEP = """
def good(samples, prompts, outputs, references):
    return {"good": [float(len(output) % 3) for output in outputs], "one": [1.0] * len(outputs)}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/first` (whole weights), `runs/lora` and rows, `questions.jsonl`."""
    folder = tmp_path_factory.mktemp("next")
    base = tiny.folder(folder / "base")
    rows = tiny.pairs(12, 2, 8)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(lines)
    settings: Any = {"data": {"rows": rows}, "runtime": {"progress": False, "device": "cpu"}}
    learnt: Any = {
        "batch": {"steps": 30, "examples_per_step": 12},
        "optim": {"learning_rate": 1e-2},
    }
    train(model=base, output=str(folder / "runs/first"), **settings, **learnt)
    train(
        model=base, output=str(folder / "runs/lora"), adapter="lora", batch={"steps": 2}, **settings
    )
    (folder / "keep.py").write_text(KEEP)
    return folder


def _blocks(page: str, mark: str = "") -> list[str]:
    """The Python blocks of a page that hold `mark`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = [
        block
        for block in re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL)
        if mark in block
    ]
    return [
        block.replace("report_to=[]", "report_to=[], use_cpu=True, bf16=False") for block in found
    ]


def _sampled(runs: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows that `sftx eval` writes of a few answers."""
    file = runs / "good.jsonl"
    file.unlink(missing_ok=True)
    asked = ["samples=3", "temperature=1", "prompts=6", "new_tokens=24", "general=false"]
    command = ["eval", str(runs / "runs/first"), str(runs / "questions.jsonl"), *asked]
    assert main([*command, f"rows={file}", f"json={runs / 'all.json'}", *arguments]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_become_weighted_rows(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _sampled(runs, f"metrics={runs / 'keep.py'}:good", "weight=good")
    samples = json.loads((runs / "all.json").read_text())["model"]["samples"]
    assert len(samples) == 6 * 3
    assert len({sample["output"] for sample in samples[:3]}) > 1
    kept: dict[tuple[str, str], float] = {}
    specials = re.compile(r"<\|?\w+\|?>")
    for sample in samples:
        if sample["ended"] and len(sample["output"]) % 3 and not specials.search(sample["output"]):
            key = (sample["prompt"], sample["output"])
            kept[key] = kept.get(key, 0.0) + sample["scores"]["good"]
    tokenizer = AutoTokenizer.from_pretrained(runs / "runs/first")
    found = {}
    for row in rows:
        *before, answer = row["messages"]
        prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
        found[prompt, answer["content"]] = row["weight"]
        (example,) = encode(row, str(runs / "runs/first"))
        assert set(example.weights) == {0.0, row["weight"]}
    assert found == kept
    assert len(found) > 3
    said = capsys.readouterr().out
    assert "6 prompts, 3 answers each" in said
    assert re.search(r"rows +\d+ answers in \d+ rows; .*left out: weight 0", " ".join(said.split()))


def test_the_seed_decides_what_is_drawn(runs: Path) -> None:
    first, again, other = _sampled(runs), _sampled(runs), _sampled(runs, "seed=5")
    assert first == again != other
    assert {row["weight"] for row in first} <= {1.0, 2.0, 3.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["samples=3"], "set temperature=1"),
        (["samples=3", "temperature=0"], "set temperature=1"),
        (["samples=0"], "at least 1"),
        (["weight=exact"], "rows=FILE, which is not given"),
        (["rows=no/such/good.jsonl"], "there is no folder no/such"),
        (["rows=good.jsonl", "weight=number"], "metrics= gives: exact, f1"),
        (["rows=good.jsonl", "prompts=0"], "no prompt is asked"),
        (["temperature=hot"], "a number is needed"),
        (["top_p=2"], "at most 1"),
        (["temperature=1", "temperature=1"], "given twice"),
        (["temprature=1"], "did you mean `temperature`"),
    ],
)
def test_mistakes(
    runs: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(runs)
    short = ["new_tokens=8"]
    assert main(["eval", "runs/first", "questions.jsonl", *short, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_texts_cannot_be_answered_in_rows(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    tokens = {"input_ids": [5, 70, 71, 72], "weights": [0, 0, 1, 1]}
    rows.write_text(json.dumps(tokens) + "\n")
    command = ["eval", str(runs / "runs/first"), str(rows), "new_tokens=8"]
    assert main([*command, f"rows={tmp_path / 'good.jsonl'}"]) == 2
    assert "holds no turns" in capsys.readouterr().err


THINKS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("output", "last"),
    [
        ("On the table.", {"content": "On the table."}),
        ("<think>A lamp</think>\n\nOn it.", {"content": "On it.", "reasoning_content": "A lamp"}),
        (
            'So:<tool_call>{"name": "find", "arguments": {"what": "x"}}</tool_call>',
            {"content": "So:", "tool_calls": [("find", {"what": "x"})]},
        ),
        ('<tool_call>{"name": "find", "argum', {"content": '<tool_call>{"name": "find", "argum'}),
        ("of <|user|> it", None),  # a special token
    ],
)
def test_thoughts_and_calls_are_written_apart(
    output: str, last: dict[str, Any] | None, tmp_path: Path
) -> None:
    made = tiny.tokenizer()
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    row = {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hm."},
            {"role": "user", "content": "Where is the lamp?"},
            {"role": "assistant", "content": "There."},
        ],
        "tools": tools,
    }
    (tmp_path / "t.jinja").write_text(THINKS)
    data: Any = {"rows": [row], "template": str(tmp_path / "t.jinja"), "cache": str(tmp_path)}
    config = make_config(model="unused", data=data, output="unused")
    encoder = Encoder(Tokenizer.of(made), config.data, 512)
    corpus, _ = load_corpora(config, encoder.tokenizer, 512, encoder=encoder)
    text = encoder.tokenizer.decode(corpus.example(0).ids)
    asked = text[: text.rindex("There.")]
    prompt = Prompt(made(asked, add_special_tokens=False)["input_ids"], asked, "There.", 0)
    ids = made(f"{output}<|end|>", add_special_tokens=False)["input_ids"]
    sample = Sample(asked, output, "There.", True, ids)
    found = written.answer_rows(config, encoder, corpus, [prompt], [sample], [0.5])
    if last is None:
        assert (found.rows, sum(found.left_out.values())) == ([], 1)
        return
    (made_row,) = found.rows
    *before, answer = [dict(message) for message in made_row["messages"]]  # type: ignore
    assert [message.get("train") for message in before] == [None, False, None]
    calls = [tuple(call["function"].values()) for call in answer.pop("tool_calls", [])]
    assert answer | ({"tool_calls": calls} if calls else {}) == {"role": "assistant", **last}
    assert (made_row["tools"], made_row["weight"]) == (tools, 0.5)
    examples = encode(made_row, made, template=str(tmp_path / "t.jinja"))
    assert examples[-1].ids.tolist()[: len(prompt.ids) + len(ids)] == [*prompt.ids, *ids]


@pytest.mark.slow
def test_the_recipe_of_the_docs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    keep, recipe = _blocks("rejection-sampling.md")
    Path("keep.py").write_text(keep.replace("reference.strip() in output", "bool(reference)"))
    exec(compile(recipe, "rejection-sampling.md", "exec"), {})
    for round in (1, 2):
        assert Path(f"runs/round-{round}/model.safetensors").is_file()


# TRL

needs_trl = pytest.mark.skipif(
    not (importlib.util.find_spec("trl") and importlib.util.find_spec("datasets")),
    reason="needs trl: pip install 'sftx[trl]'",
)


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mark", "saved"),
    [
        ('DPOTrainer(\n    model="runs/first"', "dpo/model.safetensors"),
        ("GRPOTrainer(", "grpo/model.safetensors"),
        ("AutoPeftModelForCausalLM", "dpo-lora/adapter_model.safetensors"),
    ],
)
def test_trl_goes_on_from_the_folder(
    mark: str, saved: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of the docs run, change the weights, and TRL asks what sftx trained."""
    monkeypatch.chdir(runs)
    (block,) = _blocks("next-stage.md", mark)
    space: dict[str, Any] = {}
    exec(compile(block, "next-stage.md", "exec"), space)
    trainer = space["trainer"]
    _check_trained(trainer, runs / "runs" / saved)
    if "prompt_ids" in trainer.train_dataset.column_names:
        _check_prompt(trainer, runs)


@needs_trl
@pytest.mark.slow
def test_grpo_goes_on_from_an_adapter(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    (block,) = _blocks("next-stage.md", "GRPOTrainer(")
    loaded = (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n"
        + block.replace(
            'model="runs/first",',
            'model=AutoPeftModelForCausalLM.from_pretrained("runs/lora", is_trainable=True),\n'
            '    processing_class=AutoTokenizer.from_pretrained("runs/lora"),',
        ).replace("runs/grpo", "runs/grpo-lora")
    )
    space: dict[str, Any] = {}
    exec(compile(loaded, "next-stage.md", "exec"), space)
    _check_trained(space["trainer"], runs / "runs/grpo-lora/adapter_model.safetensors")


def _check_trained(trainer: Any, saved: Path) -> None:
    from safetensors.torch import load_file

    assert trainer.state.global_step == 2
    name = "lora" if "lora" in saved.parent.name else "first"
    before = load_file(saved.parents[1] / name / saved.name)
    after = load_file(saved)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def _check_prompt(trainer: Any, runs: Path) -> None:
    (row,) = (dict(row) for row in trainer.train_dataset.select([0]))
    chosen = {"role": "assistant", "content": "On the table."}
    asked = {"role": "user", "content": "Where is the lamp?"}
    (example,) = encode({"messages": [asked, chosen]}, str(runs / "runs/first"))
    begin = int(example.weights.argmax())
    assert row["prompt_ids"] == example.ids[:begin].tolist()
