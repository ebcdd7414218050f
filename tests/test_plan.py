"""`sftx plan`: for this machine from a run's own data, and for GPUs that are not there from a
config.json alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sftx import cli
from sftx.cli import plan
from sftx.eval import generation_memory


def test_for_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "CALIBRATION", 64)
    model = tiny.folder(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "up", "completion": "down"}\n' * 40)
    run = [
        f"model={model}",
        f"data={tmp_path / 'rows.jsonl'}",
        f"data.cache={tmp_path / 'cache'}",
        "runtime.device=cpu",
    ]
    assert cli.main(["plan", *run, "adapter=lora", f"json={tmp_path / 'plan.json'}"]) == 0
    text, facts = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "a lora adapter" in text
    assert f"{facts['trainable']:,} train" in text
    assert (facts["steps"], facts["recomputed_layers"], facts["layers"], facts["precision"]) == (
        3,
        0,
        2,
        "float32",
    )
    assert facts["tokens"] > facts["targets"] > 0 < facts["seconds"]
    assert 0 < facts["fill"] <= 1
    assert not (tmp_path / "unused").exists()


def test_what_sharing_saves_is_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "CALIBRATION", 64)
    rows = [{"prompt": "a long question " * 4, "completion": "so " * (i + 1)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [
        f"model={tiny.folder(tmp_path / 'model')}",
        f"data={tmp_path / 'rows.jsonl'}",
        f"data.cache={tmp_path / 'cache'}",
        "runtime.device=cpu",
        f"json={tmp_path / 'plan.json'}",
    ]
    assert cli.main(["plan", *run]) == 0
    text, facts = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    shared = facts["shared_prefixes"]
    assert f"prefixes are computed once: {shared['tokens']:.0%} of the tokens" in text
    assert f"without, about {shared['seconds_without']:,.0f} s" in text
    assert 0 < facts["seconds"] < shared["seconds_without"]
    first, piece, tails = facts["tree"]
    assert first == "the largest tree of step 1:"
    assert piece.endswith("tokens, once for 4 examples")
    assert tails.startswith("    then ")
    assert tails.endswith("tokens in each of 4 examples")
    assert f"\n         {piece}\n         {tails}\n" in text
    assert cli.main(["plan", *run, "runtime.share_prefixes=off"]) == 0
    assert "prefixes are computed once" not in capsys.readouterr().out


@pytest.mark.parametrize("heads", [1, 4])
def test_what_answers_take_holds_what_generating_takes(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(num_key_value_heads=heads, num_attention_heads=4, hidden_size=64).eval()
    prompts, longest, new = 3, 200, 6
    ids = torch.ones(prompts, longest, dtype=torch.int64)
    known = (model.config, prompts, longest, new, 4)
    generate: Any = model.generate
    peak = _peak(lambda: generate(ids, max_new_tokens=new, min_new_tokens=new))
    assert peak < plan.most_memory(*known) < 4 * peak
    monkeypatch.setattr(generation_memory, "TOKENS_PER_BATCH", 2 * (longest + new))
    row = generation_memory.bytes_of_row(model.config, longest, new, 4)
    assert plan.most_memory(*known) == 2 * row
    assert plan.most_memory(*known, free=row) == row  # it does not fit: one at a time


def _peak(work: Callable[[], object]) -> int:
    """Bytes that PyTorch allocates inside `work` and has not freed, at their most."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    recorded: Any = profile.profiler
    held = peak = 0
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_answers_are_in_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.folder(tmp_path / "model")
    arguments = ["plan", f"model={model}/config.json", "gpus=1", "gpu_memory=1GiB"]
    assert cli.main(arguments) == 0
    assert "\nanswers  " not in capsys.readouterr().out
    asked = ["data.eval=held_out.jsonl", "eval.prompts=100"]
    assert cli.main([*arguments, *asked]) == 0
    assert "\nanswers  up to 0.0" in (text := capsys.readouterr().out)
    assert "\nwarning" not in text
    assert cli.main([*arguments, "eval.prompts=other.jsonl", "eval.new_tokens=90000000"]) == 0
    assert "ask fewer eval.prompts" in capsys.readouterr().out


@pytest.mark.slow
def test_for_gpus_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (
        Path(tiny.folder(tmp_path / "model", hidden_size=256, intermediate_size=1024))
        / "config.json"
    )

    def planned(memory: str, code: int, *more: str) -> dict[str, object]:
        arguments = [
            "plan",
            f"model={config}",
            "gpus=8",
            f"gpu_memory={memory}",
            f"json={tmp_path / 'p.json'}",
            *more,
        ]
        assert cli.main(arguments) == code
        return json.loads((tmp_path / "p.json").read_text())

    many = planned("10GiB", 0, "runtime.tokens_per_pack=256")
    assert (many["gpus_needed"], many["tokens_per_pack"], many["recomputed_layers"]) == (1, 256, 0)
    assert isinstance(many["memory"], dict)
    assert many["memory"]["weights"] * 8 == pytest.approx(4 * int(str(many["weights"])), rel=0.01)
    layers = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
    rest = int(str(many["weights"])) - layers

    def weights(*more: str) -> float:
        facts = planned("10GiB", 0, "runtime.tokens_per_pack=256", *more)
        assert isinstance(facts["memory"], dict)
        return facts["memory"]["weights"] * 8 - 4 * int(str(facts["trainable"])) * (
            "adapter=lora" in more
        )

    assert weights("optim.weights=bf16_stochastic") == pytest.approx(2 * (layers + rest), rel=0.01)
    assert "rounded at random" in capsys.readouterr().out
    # Frozen matrices of layers are kept as they are multiplied, in bf16.
    assert weights("adapter=lora") == pytest.approx(2 * layers + 4 * rest, rel=0.01)
    # 4 bits, a byte per 64 and 4 bytes per 64 * 256, which every GPU holds whole; the rest is in
    # shards
    packed = layers * (0.5 + 1 / 64 + 1 / 4096)
    assert weights("adapter=lora", "adapter.quantize=nf4") == pytest.approx(
        8 * packed + 4 * rest, rel=0.01
    )
    assert "base in 4 bits" in capsys.readouterr().out
    (tmp_path / "tokens").mkdir()
    tiny.tokenizer().save_pretrained(tmp_path / "tokens")
    new = f"model.add_tokens=[{','.join(f'<{i}>' for i in range(1000))}]"
    more = weights(f"model.tokenizer={tmp_path / 'tokens'}", new) - 4 * (layers + rest)
    assert more == pytest.approx(4 * 1000 * 256, rel=0.01)
    few = planned("60MiB", 1, "runtime.tokens_per_pack=256", "runtime.context_parallel=1")
    assert "predicted to need" in str(few["refused"])
    assert "refused" in capsys.readouterr().out
    assert cli.main(["plan", f"model={config}", "gpus=8"]) == 2
    assert cli.main(["plan", f"model={config}", "gpus=8", "gpu_memory=lots"]) == 2
    assert "expected a size such as 141GiB" in capsys.readouterr().err
