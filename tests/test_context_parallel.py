"""Context parallelism: ranks that share a pack compute what one rank computes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny
import torch

from sftx.cli.plan import run as plan
from sftx.data.pack import build_pack
from sftx.model.context_parallel import FILLER, Context, _key_heads
from sftx.model.pack_loss import to_tensors
from sftx.settings.load import load_config
from sftx.settings.make import make_config
from sftx.types import Example, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("context")
    ranks.model(made / "model")
    return made


def write(folder: Path, name: str, **changes: Any) -> Path:
    changes = {"batch": {"epochs": 12 / 35}, **changes}
    return ranks.write_run(folder, changes.pop("model", str(folder / "model")), name, **changes)


def assert_same_run(folder: Path, name: str, reference: str) -> None:
    """Loss, gradient, accuracy of every step, the held-out loss and the trained weights."""
    ours, theirs = ranks.records(folder / name), ranks.records(folder / reference)
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "accuracy"):
            assert mine[key] == pytest.approx(other[key], rel=1e-6), (name, mine["step"], key)
        assert mine["packs"] == other["packs"], (name, mine["step"])
    # AdamW makes steps of 3e-3 of the smallest gradients, and of their rounding.
    assert ranks.difference(folder / name, folder / reference) < 1e-5, name
    after = [ranks.facts(folder / each)["eval_after"]["loss"] for each in (name, reference)]
    assert after[0] == pytest.approx(after[1], rel=1e-6)


def test_the_parts_of_a_pack_are_all_of_it_and_a_filler_without_weight() -> None:
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(0, 90, n).astype(np.int32), rng.random(n).astype(np.float32))
        for n in (5, 1, 7)
    ]
    for example in examples:
        example.weights[0] = 0
    pack = build_pack(examples, (3, 1, 4))
    whole = to_tensors(pack, torch.device("cpu"))
    parts = [to_tensors(pack, torch.device("cpu"), Context(4, rank, "")) for rank in range(4)]
    ids = torch.cat([part.ids for part in parts])
    assert torch.equal(ids[:13], whole.ids)
    assert len(ids) == 16, "four equal parts"
    places = torch.cat([part.index + 4 * rank for rank, part in enumerate(parts)])
    for name, found in (("index", places), ("label", None), ("weight", None)):
        joined = torch.cat([getattr(part, name) for part in parts]) if found is None else found
        assert torch.equal(joined, getattr(whole, name)), name
    for part in parts:
        assert part.cu_seqlens_cpu.tolist() == [0, 5, 6, 13, 16], "the segments of the whole pack"
        assert part.examples == (3, 1, 4, FILLER)
        assert part.longest == 7


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "enough"),
    [(8, 2, 4, 4), (8, 1, 2, 2), (6, 3, 2, 6), (4, 4, 2, 4), (12, 8, 3, 12)],
)
def test_heads_of_keys_are_repeated_as_far_as_needed(
    heads: int, key_heads: int, size: int, enough: int
) -> None:
    assert _key_heads(heads, key_heads, size) == enough


@pytest.mark.slow
def test_two_ranks_that_share_every_pack_train_as_one_does(folder: Path) -> None:
    """A window shorter than the examples, more query heads than key heads, ragged packs."""
    model = tiny.folder(folder / "window", family="Mistral", num_hidden_layers=2, sliding_window=7)
    ranks.run(write(folder, "one", model=model), 0)
    shared = {"context_parallel": 2, "parallel": "fsdp"}
    output = ranks.run(write(folder, "two", model=model, runtime=shared), 2)
    assert "48 tokens per pack shared by 2 processes" in output
    assert ranks.facts(folder / "two")["context_parallel"] == 2
    assert_same_run(folder, "two", "one")


@pytest.mark.long
def test_any_way_of_training_is_the_same_on_ranks_that_share_packs(folder: Path) -> None:
    """2 ranks in one group, 4 in one and in two: everything that changes what a layer computes."""
    untied = tiny.folder(folder / "untied", num_hidden_layers=3, tie_word_embeddings=False)
    ways: dict[str, dict[str, Any]] = {
        "full": {},
        "lora": {"adapter": {"method": "lora", "rank": 4}},
        "recompute": {"runtime": {"recompute": "all"}},
        "noise": {"loss": {"label_smoothing": 0.1, "z_loss": 1e-3, "neftune_alpha": 5.0}},
        "untied": {"model": untied},
    }
    layouts = {"2x2": (2, 2, "fsdp"), "4x2": (4, 2, "hsdp"), "4x4": (4, 4, "replicate")}

    def paths(suffix: str, **runtime: Any) -> list[Path]:
        made = []
        for name, way in ways.items():
            merged = {**way, "runtime": {**way.get("runtime", {}), **runtime}}
            made.append(write(folder, f"{name}-{suffix}", **merged))
        return made

    ranks.together(paths("1"), 0)
    for suffix, (count, size, parallel) in layouts.items():
        runtime = {"context_parallel": size, "parallel": parallel}
        ranks.together(paths(suffix, **runtime), count)
        for name in ways:
            assert_same_run(folder, f"{name}-{suffix}", f"{name}-1")


@pytest.mark.slow
def test_a_run_whose_ranks_share_packs_is_continued_to_the_bit(folder: Path) -> None:
    runtime = {"context_parallel": 2}
    whole = write(folder, "whole", runtime=runtime, checkpoint={"every": 2})
    ranks.run(whole, 2)
    part = write(folder, "part", runtime=runtime, checkpoint={"every": 2})
    program = (
        "import sys, os\n"
        "from sftx.settings.load import load_config\n"
        "from sftx.training.loop import steps\n"
        "for record in steps(load_config(sys.argv[1])):\n"
        "    if record.step == 2: os._exit(0)\n"
    )
    (folder / "two_steps.py").write_text(program, encoding="utf-8")
    ranks.run(part, 2, program=[str(folder / "two_steps.py")])
    ranks.run(part, 2)
    assert ranks.difference(folder / "part", folder / "whole") == 0


def test_what_cannot_be_shared_is_refused_by_name(folder: Path) -> None:
    cases = {
        "no multiple": (write(folder, "r1", runtime={"context_parallel": 2}), "the run has 1"),
    }
    for path, message in cases.values():
        with pytest.raises(UserError, match=message):
            plan(load_config(str(path)))
    heads = make_config(
        model=str(folder / "model"),
        data={"train": str(folder / "rows.jsonl")},
        output=str(folder / "never"),
        runtime={"context_parallel": 3},
    )
    with pytest.raises(UserError, match="3 ranks cannot share 4 attention heads equally"):
        plan(heads, gpus="3", gpu_memory="1GiB")


@pytest.mark.slow
def test_the_plan_shares_packs_where_an_example_does_not_fit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory is bisected to where one GPU no longer holds the step and two that share it do."""
    config = make_config(
        model=str(folder / "model"),
        output="unused",
        data={"train": [], "max_length": 128},
        runtime={"recompute": "none", "tokens_per_pack": 128},
    )

    def found(memory: int) -> dict[str, Any]:
        plan(config, gpus="2", gpu_memory=f"{memory / 1024:.3f}KiB", json=str(tmp_path / "f.json"))
        return json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))

    enough = found(1 << 40)
    assert enough["context_parallel"] == 1
    # Weights are gathered more than once before packs are shared.
    enough = found(int(enough["memory"]["peak"] / 0.92) - 2048)
    assert enough["context_parallel"] == 1
    peak = int(enough["memory"]["peak"] / 0.92)
    fewer = found(peak - 2048)
    assert fewer["context_parallel"] == 2
    assert "refused" not in fewer
    assert fewer["memory"]["peak"] < enough["memory"]["peak"]
    assert "each shared by 2 GPUs" in capsys.readouterr().out
