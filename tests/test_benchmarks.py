"""`sftx eval MODEL tasks=`: lm-eval's numbers against transformers alone; what is not combined."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sftx.cli import main

FAST = ["runtime.device=cpu", "runtime.progress=false"]
ANSWER = 6  # tokens


class _Naive:
    """A model and its tokenizer by transformers and peft alone, one text at a time."""

    def __init__(self, folder: str, adapter: str | None, chat: bool) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        self.model.eval()
        self.tokenizer, self.chat = tiny.tokenizer(), chat

    def prompt(self, question: str) -> str:
        text = f"Q: {question} A:"
        return f"<|user|>{text}<|end|>\n<|assistant|>" if self.chat else text

    def log_probability(self, question: str, choice: str) -> float:
        first = self.tokenizer.encode(self.prompt(question))
        then = self.tokenizer.encode(choice if self.chat else f" {choice}")
        ids = torch.tensor([first + then])
        with torch.no_grad():
            logs = self.model(input_ids=ids).logits[0].double().log_softmax(-1)
        return sum(float(logs[len(first) - 1 + i, token]) for i, token in enumerate(then))

    def accuracy(self, rows: list[dict[str, Any]]) -> float:
        right = 0
        for row in rows:
            scores = [self.log_probability(row["question"], c) for c in row["choices"]]
            right += scores.index(max(scores)) == row["label"]
        return right / len(rows)

    def answer(self, question: str) -> str:
        ids = torch.tensor([self.tokenizer.encode(self.prompt(question))])
        made = []
        for _ in range(ANSWER):
            with torch.no_grad():
                token = int(self.model(input_ids=ids).logits[0, -1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            made.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        text = str(self.tokenizer.decode(made, skip_special_tokens=True))
        return text.partition("\n")[0]


def _rows() -> list[dict[str, Any]]:
    words = tiny.WORDS
    return [
        {
            "question": word,
            "choices": [words[(i + k) % len(words)] for k in (1, 4, 7)],
            "label": i % 3,
        }
        for i, word in enumerate(words)
    ]


def _tasks(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Two tasks on one local file: a choice, and an answer that must be exact."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "Q: {{question}} A:",
    }
    choice = {
        "task": "own_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    answer = {
        "task": "own_answer",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": ANSWER, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, answer):  # JSON is YAML
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return tiny.folder(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_numbers_are_those_of_transformers_alone(
    chat: bool, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapter = str(tmp_path / "adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(adapter)
    base, adapted = _Naive(folder, None, chat), _Naive(folder, adapter, chat)
    rows = _rows()
    for i, row in enumerate(rows):  # the adapter answers every third exactly
        row["answer"] = adapted.answer(row["question"]) if i % 3 == 0 else "something else"
    out = tmp_path / "out.json"
    tasks = ["tasks=own_choice,own_answer", f"tasks_path={_tasks(tmp_path / 'tasks', rows)}"]
    chosen = [] if chat else ["chat=false", "limit=8"]
    assert main(["eval", adapter, f"base={folder}", *tasks, *FAST, *chosen, f"json={out}"]) == 0
    asked = rows if chat else rows[:8]
    found = json.loads(out.read_text())
    for name, naive in (("base", base), ("model", adapted)):
        numbers = found[name]["numbers"]
        assert numbers["own_choice acc"] == pytest.approx(naive.accuracy(asked))
        exact = [naive.answer(row["question"]) == row["answer"] for row in asked]
        assert numbers["own_answer exact_match"] == pytest.approx(sum(exact) / len(asked))
    assert found["model"]["numbers"]["own_answer exact_match"] == pytest.approx(4 / 12, abs=0.05)
    assert found["model"]["tasks"]["own_choice"]["asked"] == len(asked)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package `lm_eval` that knows one task, and notes what it is called with."""
    calls: list[dict[str, Any]] = []

    class TaskManager:
        all_tasks = ("arc_easy",)

        def __init__(self, include_path: str | None) -> None:
            self.include_path = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name in self.all_tasks]

    def simple_evaluate(model: object, **given: Any) -> dict[str, Any]:
        calls.append({"model": model, **given})
        if given["limit"] == 13:
            raise ConnectionError("the hub cannot be reached")
        results = {"alias": "x", "acc,none": 0.25, "acc_stderr,none": "N/A", "em,strict": 0.5}
        return {
            "results": {"arc_easy": results},
            "versions": {"arc_easy": 1.0},
            "n-shot": {"arc_easy": 0},
            "n-samples": {"arc_easy": {"original": 9, "effective": 7}},
        }

    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.models": {},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.evaluator": {"simple_evaluate": simple_evaluate},
        "lm_eval.models.huggingface": {"HFLM": lambda **given: SimpleNamespace(**given)},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_bounds_and_the_file(
    tmp_path: Path, folder: str, stand_in: list[dict[str, Any]], capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.json"
    common = ["eval", folder, "tasks=arc_easy", *FAST]
    assert main([*common, f"json={out}", "min.arc_easy acc=0.2"]) == 0
    assert json.loads(out.read_text())["model"] == {
        "numbers": {"arc_easy acc": 0.25, "arc_easy em strict": 0.5},
        "tasks": {"arc_easy": {"version": 1.0, "shots": 0, "asked": 7, "rows": 9}},
    }
    assert stand_in[0]["apply_chat_template"]
    assert stand_in[0]["model"].tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert main([*common, "chat=false", "limit=5", "min.arc_easy acc=0.3"]) == 1
    assert "missed: arc_easy acc is 0.25" in capfd.readouterr().out
    assert (stand_in[1]["apply_chat_template"], stand_in[1]["limit"]) == (False, 5)
    assert main([*common, "data.template=none"]) == 0
    assert not stand_in[2]["apply_chat_template"]
    assert main([*common, "limit=13"]) == 2
    assert "tasks=arc_easy cannot be run: the hub cannot be reached" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=arc_eazy"], "no task 'arc_eazy'; did you mean arc_easy?"),
        (["tasks=,"], "no task is named"),
        (["tasks=arc_easy", "tasks_path=nowhere"], "there is no folder nowhere"),
        (["tasks=arc_easy", "limit=0"], "expected a whole number of at least 1"),
        (["tasks=arc_easy", "chat=yes"], "expected true or false"),
        (["tasks=arc_easy", "chat=true", "data.template=none"], "has no chat template"),
        (["rows.jsonl", "tasks=arc_easy", "metrics=f1"], "leave out DATA, metrics"),
        (["rows.jsonl", "limit=3"], "limit=: it belongs to tasks="),
        ([], "no data is named"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str],
    message: str,
    folder: str,
    stand_in: list[dict[str, Any]],
    capfd: pytest.CaptureFixture,
) -> None:
    assert main(["eval", folder, *arguments, *FAST]) == 2
    assert message in capfd.readouterr().err
    assert not stand_in


def test_without_the_package(
    folder: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", folder, "tasks=arc_easy", *FAST]) == 2
    assert "pip install 'sftx[benchmarks]'" in capfd.readouterr().err
