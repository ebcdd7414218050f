"""Answers and their numbers while training: nothing of them changes the run, all of them are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sftx
from sftx.cli import main
from sftx.data.tokenizer import Tokenizer
from sftx.eval import generate, generation_memory

ROWS = [[f"What is {i} plus one?", f"It is {i + 1}."] for i in range(44)]
TRAIN, HELD = ROWS[:40], ROWS[40:]


def settings(path: str, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of six steps, evaluated every second one."""
    base: dict[str, Any] = {
        "model": path,
        "data": {
            "rows": TRAIN,
            "eval_rows": HELD,
            "cache": str(output.parent / "cache"),
            "workers": 0,
        },
        "output": str(output),
        "batch": {"examples_per_step": 8, "steps": 6},
        "optim": {"learning_rate": 3e-3},
        "eval": {"every": 2, "prompts": 3, "new_tokens": 6, "general": False},
        "runtime": {"progress": False, "device": "cpu", "threads": 1},
    }
    return tiny.merged(base, changes)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line["eval"] for line in lines(folder, "metrics.jsonl") if line["eval"]}


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text("utf-8"))


def same_weights(one: Path, other: Path) -> bool:
    name = next(path.name for path in one.glob("*model.safetensors"))
    first, second = load_file(one / name), load_file(other / name)
    return all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys())


LORA = {"method": "lora", "rank": 4, "dropout": 0.3}


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["all weights", "lora"])
def test_a_run_that_answers_trains_as_one_that_does_not(
    adapter: dict[str, Any], model: str, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"adapter": adapter} if adapter else {}
    plain = settings(model, tmp_path / "plain", **more)
    del plain["eval"]
    sftx.train(**plain)
    more["eval"] = {"general": True}
    result = sftx.train(**settings(model, tmp_path / "asked", **more))
    assert same_weights(tmp_path / "plain", tmp_path / "asked")
    samples = lines(result.folder, "samples.jsonl")
    assert [sample["step"] for sample in samples] == [s for s in range(0, 7, 2) for _ in range(3)]
    assert samples[0]["prompt"] == f"<|user|>{HELD[0][0]}<|end|>\n<|assistant|>"
    assert samples[0]["reference"] == HELD[0][1]
    assert samples[0]["scores"].keys() == {"exact", "f1"}
    assert result.eval_before is not None
    assert result.eval_after is not None
    assert result.eval_before["kl"] == 0.0
    assert result.eval_after["kl"] > 0.01
    assert result.eval_after.keys() >= {"exact", "f1", "ended", "general loss"}


@pytest.mark.parametrize("at", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 5))])
def test_a_run_killed_after_an_evaluation_repeats_it(at: int, model: str, tmp_path: Path) -> None:
    """With a checkpoint every third step: a kill at 4 goes back to 3, after the answers of 2."""
    more: dict[str, Any] = {"checkpoint": {"every": 3}}
    whole = sftx.train(**settings(model, tmp_path / "whole", **more))
    steps = sftx.steps(**settings(model, tmp_path / "killed", **more))
    for record in steps:
        if record.step == at:
            steps.close()
            break
    assert lines(tmp_path / "killed", "samples.jsonl")[-1]["step"] == at - at % 2
    again = sftx.train(**settings(model, tmp_path / "killed", **more))
    assert same_weights(whole.folder, again.folder)
    assert evaluations(whole.folder) == evaluations(again.folder)
    assert lines(whole.folder, "samples.jsonl") == lines(again.folder, "samples.jsonl")


def _held_out_loss(folder: Path, base: str | None = None) -> float:
    """The loss of a written folder, by the model's own forward, one row at a time."""
    fast: Any = AutoTokenizer.from_pretrained(folder)
    source = base or folder
    net: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    if base is not None:
        net = PeftModel.from_pretrained(net, str(folder)).double()
    data = [example for row in HELD for example in sftx.encode(row, fast)]
    with torch.no_grad():
        return float(tiny.naive_loss(net.eval(), data))


# So fast that the loss soon rises again.
TOO_FAST = {"learning_rate": 0.1, "schedule": "constant", "max_grad_norm": 0.0}


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["all weights", "lora"])
def test_the_best_model_is_written_and_the_run_stops_where_nothing_is_gained(
    adapter: dict[str, Any], model: str, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"batch": {"steps": 30}, "optim": TOO_FAST}
    more["eval"] = {"every": 2, "prompts": 0, "keep_best": "loss", "stop_after": 3}
    if adapter:
        more["adapter"] = adapter
    config = settings(model, tmp_path / "run", **more)
    del config["eval"]["new_tokens"], config["eval"]["general"]
    result = sftx.train(**config)
    found = evaluations(result.folder)
    losses = {step: numbers["loss"] for step, numbers in found.items() if step}
    best = min(losses, key=losses.__getitem__)
    assert best + 6 == result.steps < 30, losses
    assert result.best == {"step": best, "metric": "loss", "value": losses[best]}
    assert result.stopped_early == "no gain in loss for 3 evaluations"
    assert result.eval_after == found[best]
    written = _held_out_loss(result.folder, model if adapter else None)
    assert written == pytest.approx(losses[best], rel=1e-6)
    assert written != pytest.approx(losses[result.steps], rel=1e-4)
    assert f"the weights after step {best}" in (result.folder / "README.md").read_text()
    if adapter:
        return
    # Killed after the best one, and again where the run would stop.
    config["output"] = str(tmp_path / "killed")
    for at in (best + 3, result.steps):
        steps = sftx.steps(**config)
        for record in steps:
            if record.step == at:
                steps.close()
                break
    again = sftx.train(**config)
    assert (again.steps, again.best) == (result.steps, result.best)
    assert same_weights(result.folder, again.folder)


def test_the_number_may_be_of_the_answers(model: str, tmp_path: Path) -> None:
    def length(samples: Any, prompts: Any, outputs: Any, references: Any) -> dict[str, Any]:
        return {"length": [len(output) for output in outputs]}

    asked = {"metrics": [length, "exact"], "keep_best": "length"}
    result = sftx.train(**settings(model, tmp_path / "run", eval=asked))
    found = {step: numbers["length"] for step, numbers in evaluations(result.folder).items()}
    del found[0]
    assert len(set(found.values())) > 1
    assert result.best is not None
    assert result.best["step"] == max(found, key=found.__getitem__)
    assert facts(result.folder)["config"]["eval"]["metrics"] == [f"{__file__}:length", "exact"]


def test_kl_and_answers_are_those_of_the_models_themselves(model: str, tmp_path: Path) -> None:
    result = sftx.train(**settings(model, tmp_path / "run"))
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    tuned: Any = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float64).eval()
    fast: Any = AutoTokenizer.from_pretrained(result.folder)
    total, count = 0.0, 0
    for row, sample in zip(HELD, lines(result.folder, "samples.jsonl")[-3:], strict=False):
        turn = [{"role": "user", "content": row[0]}]
        prompt = fast.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
        ids = prompt["input_ids"]
        stops = {"eos_token_id": [2, 3], "pad_token_id": 0, "max_new_tokens": 6}
        with torch.no_grad():
            said = base.generate(**prompt, **stops)
            log_p, log_q = (each(said).logits[0].log_softmax(-1) for each in (tuned, base))
            answer = tuned.generate(**prompt, **stops)[0, ids.shape[1] :]
        first = ids.shape[1] - 1
        kl = torch.nn.functional.kl_div(
            log_q[first:-1], log_p[first:-1], log_target=True, reduction="sum"
        )
        total, count = total + float(kl), count + said.shape[1] - ids.shape[1]
        ended = int(answer[-1]) in (2, 3)
        assert (sample["tokens"], sample["ended"]) == (len(answer), ended)
        assert sample["output"] == fast.decode(answer[: len(answer) - ended])
    assert result.eval_after is not None
    assert result.eval_after["kl"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["all weights", "lora"])
def test_the_verb_says_what_the_run_says(
    adapter: dict[str, Any], model: str, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"adapter": adapter} if adapter else {}
    more["eval"] = {"general": True}
    result = sftx.train(**settings(model, tmp_path / "run", **more))
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in HELD))
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    arguments = ["prompts=3", "new_tokens=6", "runtime.device=cpu", f"json={out}", f"html={page}"]
    base = [] if adapter else [f"base={model}"]
    assert main(["eval", str(result.folder), str(held), *base, *arguments]) == 0
    found = json.loads(out.read_text())
    assert result.eval_after is not None
    assert result.eval_before is not None
    for name, value in result.eval_after.items():
        assert found["model"]["numbers"][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    for name, value in result.eval_before.items():
        if name != "kl":
            assert found["base"]["numbers"][name] == pytest.approx(value, rel=1e-5), name
    samples = lines(result.folder, "samples.jsonl")[-3:]
    assert [each["output"] for each in found["model"]["samples"]] == [s["output"] for s in samples]
    text = page.read_text()
    assert "://" not in text
    assert "<script" not in text
    assert "&lt;|user|&gt;" in text


def test_prompts_of_a_file_need_no_held_out_rows(model: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "What is love?", "completion": "It is love."}\n')
    config = settings(model, tmp_path / "run", eval={"prompts": str(file), "keep_best": "f1"})
    del config["data"]["eval_rows"]
    result = sftx.train(**config)
    assert result.eval_after is not None
    assert "loss" not in result.eval_after
    assert lines(result.folder, "samples.jsonl")[-1]["reference"] == "It is love."
    config = settings(model, tmp_path / "rows", eval={"prompts": [HELD[0]], "general": False})
    sftx.train(**config)
    assert lines(tmp_path / "rows", "samples.jsonl")[0]["reference"] == HELD[0][1]


def raises(samples: Any, prompts: Any, outputs: Any, references: Any) -> dict[str, Any]:
    """A metric with a mistake in it."""
    raise KeyError("answer")


def test_a_metric_that_fails_is_named_before_training(model: str, tmp_path: Path) -> None:
    for metric, message in (
        (raises, "metric 'raises': KeyError: 'answer'"),
        (lambda *_: {"m": [1.0]}, "'m' has 1 numbers for 3 samples"),
        (lambda *_: {"m": [float("nan")] * 3}, "'m' of sample 0 is nan"),
        (lambda *_: {"loss": [1.0] * 3}, "'loss' is the name of another number"),
        ("exactly", "metric 'exactly' is not known"),
    ):
        with pytest.raises(sftx.UserError, match=message):
            sftx.train(**settings(model, tmp_path / "run", eval={"metrics": [metric]}))
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_metric_that_fails_later_costs_its_number_alone(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = iter(range(100))

    def sometimes(*_: Any) -> dict[str, Any]:
        if next(calls) == 2:
            raise KeyError("answer")
        return {"luck": [1.0, 2.0, 3.0]}

    result = sftx.train(**settings(model, tmp_path / "run", eval={"metrics": [sometimes, "exact"]}))
    found = evaluations(result.folder)
    assert [step for step in found if "luck" not in found[step]] == [2]
    assert all("exact" in numbers for numbers in found.values())
    assert "warning: metric 'sometimes': KeyError: 'answer'; the num" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {"new_tokens": 250}}, "leave no room for 250 new tokens in 256 positions"),
        ({"eval": {"keep_best": "bleu"}}, "no evaluation has the number 'bleu'; they have loss"),
        ({"data": {"eval_rows": None}}, "takes held-out rows, and there are none"),
        ({"eval": {"every": 0, "keep_best": "f1"}}, "`keep_best` compares evaluations"),
        ({"eval": {"every": 0, "stop_after": 2}}, "`stop_after` compares evaluations"),
        ({"eval": {"min_delta": 0.1}}, "says what counts as a gain"),
        (
            {"eval": {"prompts": 0, "general": True}},
            "`new_tokens` is about answers; set `prompts` too",
        ),
        ({"eval": {"prompts": ["a text"]}}, "no prompt is left to be asked: 1 prompts are not"),
        ({"eval": {"prompts": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"eval": {"general": "nowhere.txt"}}, "nowhere.txt"),
    ],
)
def test_mistakes_are_named_before_training(
    changes: dict[str, Any], message: str, model: str, tmp_path: Path
) -> None:
    with pytest.raises(sftx.UserError, match=message):
        sftx.train(**settings(model, tmp_path / "run", **changes))


def test_a_prompt_without_room_is_counted_and_left_out(model: str, tmp_path: Path) -> None:
    rows = [*HELD, ["x" * 235, "y"]]
    asked = {"prompts": 5, "new_tokens": 20}
    result = sftx.train(**settings(model, tmp_path / "run", data={"eval_rows": rows}, eval=asked))
    note = "1 prompts are not asked: they leave no room for 20 new tokens in 256 positions"
    assert note in facts(result.folder)["notes"]
    assert len(lines(result.folder, "samples.jsonl")) == 4 * 4


def test_a_base_that_only_the_adapter_names_is_not_fetched(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = sftx.train(**settings(model, tmp_path / "run", adapter=LORA))
    file = result.folder / "adapter_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"base_model_name_or_path": "somebody/else"}))
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(HELD[0]) + "\n")
    asked: list[bool] = []

    def download(name: str, local_files_only: bool = False) -> str:
        asked.append(local_files_only)
        raise FileNotFoundError(name)

    monkeypatch.setattr("sftx.model.on_disk.snapshot_download", download)
    assert main(["eval", str(result.folder), str(held)]) == 2
    assert asked == [True]
    assert main(["eval", str(result.folder), str(held), f"base={model}", "new_tokens=4"]) == 0


def test_without_an_evaluation_at_the_start_the_later_ones_are_the_same(
    model: str, tmp_path: Path
) -> None:
    whole = sftx.train(**settings(model, tmp_path / "whole", batch={"steps": 4}))
    later = sftx.train(
        **settings(model, tmp_path / "later", batch={"steps": 4}, eval={"at_start": False})
    )
    expected = [line for line in lines(whole.folder, "samples.jsonl") if line["step"]]
    assert lines(later.folder, "samples.jsonl") == expected
    assert (later.eval_before, later.eval_after) == (None, whole.eval_after)


@pytest.mark.slow
def test_ranks_answer_and_keep_the_best_as_one_process_does(tmp_path: Path) -> None:
    asked = {"every": 4, "prompts": 5, "new_tokens": 6, "keep_best": "loss", "stop_after": 9}
    path = ranks.model(tmp_path / "model")
    ranks.run(ranks.write_run(tmp_path, path, "one", eval=asked), 0)
    for layout in ("replicate", "fsdp"):
        runtime = {"parallel": layout}
        ranks.run(ranks.write_run(tmp_path, path, layout, eval=asked, runtime=runtime), 2)
        one, other = tmp_path / "one", tmp_path / layout
        assert [{**sample, "scores": None} for sample in lines(one, "samples.jsonl")] == [
            {**sample, "scores": None} for sample in lines(other, "samples.jsonl")
        ]
        for step, numbers in evaluations(one).items():
            assert evaluations(other)[step] == pytest.approx(numbers, rel=1e-3, abs=1e-5)
        assert facts(other)["best"]["step"] == facts(one)["best"]["step"]
        assert ranks.difference(one, other) < 1e-4
    lora = {"adapter": {"method": "lora", "rank": 2}, "eval": asked}
    ranks.run(ranks.write_run(tmp_path, path, "lora one", **lora), 0)
    lora["runtime"] = {"parallel": "fsdp"}
    ranks.run(ranks.write_run(tmp_path, path, "lora two", **lora), 2)
    one, two = evaluations(tmp_path / "lora one"), evaluations(tmp_path / "lora two")
    assert {s: pytest.approx(n, rel=1e-3, abs=1e-5) for s, n in one.items()} == two


def test_ranks_share_the_prompts_and_give_the_answers_of_one(monkeypatch: Any) -> None:
    """Each of two ranks makes its groups; together they are those of one process."""
    net = tiny.model().eval()
    tokenizer = Tokenizer.of(tiny.tokenizer())
    ids = [tokenizer.encode(row[0][: 5 + i]) for i, row in enumerate(ROWS[:7])]
    prompts = [generate.Prompt(each, "", "") for each in ids]
    monkeypatch.setattr(generation_memory, "TOKENS_PER_BATCH", 40)
    alone = generate.answer(net, tokenizer, prompts, [], 6)
    parts: list[torch.Tensor] = []
    for rank in (0, 1):
        monkeypatch.setattr(generate.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(generate.distributed, "world_size", lambda: 2)
        monkeypatch.setattr(generate.distributed, "all_reduce_sum", parts.append)
        generate.answer(net, tokenizer, prompts, [], 6)
    first, second = parts[0], parts[2]
    assert bool(((first != 0).any(1) ^ (second != 0).any(1)).all())  # each prompt on one rank
    assert (first + second).tolist() == [sample.ids for sample in alone]


def test_each_prompt_has_its_own_answer_where_the_folder_asks_for_several() -> None:
    net = tiny.model().eval()
    tokenizer = Tokenizer.of(tiny.tokenizer())
    prompts = [generate.Prompt(tokenizer.encode(text), "", "") for text in ("abc", "xyz w", "q")]
    net.generation_config.update(do_sample=True, top_k=1)
    alone = generate.answer(net, tokenizer, prompts, [], 6)
    assert len({sample.ids[0] for sample in alone}) == 3
    net.generation_config.num_return_sequences = 2
    assert generate.answer(net, tokenizer, prompts, [], 6) == alone


def test_settings_come_before_those_of_the_folder() -> None:
    net = tiny.model().eval()
    tokenizer = Tokenizer.of(tiny.tokenizer())
    prompts = [generate.Prompt(tokenizer.encode(row[0][:5]), "", "") for row in ROWS[:3]]
    plain = generate.answer(net, tokenizer, prompts, [], 6)
    first = {sample.ids[0] for sample in plain}
    banned = generate.answer(net, tokenizer, prompts, [], 6, settings={"suppress_tokens": [*first]})
    assert not first & {token for sample in banned for token in sample.ids}
    calls: list[int] = []

    def watch(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(input_ids.shape[1])
        return scores

    generate.answer(net, tokenizer, prompts, [], 6, settings={"logits_processor": [watch]})
    assert calls
