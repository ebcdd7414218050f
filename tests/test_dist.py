"""Several ranks: the same numbers as one, checkpoints for any number of them, and one end for all."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from sftx import dist
from sftx.data.cache import Cache
from sftx.settings import load_config

SEVERAL = [str(Path(__file__).with_name("several_runs.py"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    ranks.model(made / "model")
    return made


def write(folder: Path, name: str, **changes: Any) -> Path:
    return ranks.write_run(folder, str(folder / "model"), name, **changes)


def assert_equal(folder: Path, name: str, reference: str) -> None:
    """Every number of the record that is not of the machine, and the weights."""
    ours, theirs = ranks.records(folder / name), ranks.records(folder / reference)
    machine = {"seconds", "tokens_per_second", "memory"}
    for mine, other in zip(ours, theirs, strict=True):
        for key in mine.keys() - machine:
            if key in ("loss", "grad_norm"):
                assert mine[key] == pytest.approx(other[key], abs=1e-6 * max(1, abs(other[key]))), (name, mine["step"])
            else:
                assert mine[key] == other[key], (name, key)
    assert ranks.difference(folder / name, folder / reference) < 1e-6
    for when in ("eval_before", "eval_after"):
        mine, other = ranks.facts(folder / name)[when], ranks.facts(folder / reference)[when]
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)


def test_two_ranks_with_a_rank_that_has_no_pack_train_as_one_does(folder: Path) -> None:
    """The quick one: two shards, three packs for them in the last step, sftx's own launcher."""
    changes: dict[str, Any] = {"batch": {"epochs": 9 / 35}, "runtime": {"tokens_per_pack": 1, "parallel": "fsdp"}}
    ranks.run(write(folder, "quick-1", **changes), 0)
    path = write(folder, "quick-2", **changes)
    output = ranks.run(path, 0, program=["-m", "sftx", "train", "nproc=2"])
    assert [record["packs"] for record in ranks.records(folder / "quick-2")] == [4, 4, 1]
    assert_equal(folder, "quick-2", "quick-1")
    assert output.count("plan     3 steps") == 1, "only rank 0 prints"


@pytest.mark.slow
def test_any_layout_on_any_number_of_ranks_gives_the_numbers_of_one_process(folder: Path) -> None:
    def runs(count: int) -> list[str]:
        names = []
        for method in ("none", "lora"):
            for parallel in ("replicate", "fsdp"):
                names.append(f"{method}-{parallel}-{count}")
                adapter = {"adapter": {"method": method, "rank": 4}} if method != "none" else {}
                write(folder, names[-1], runtime={"parallel": parallel}, **adapter)
        return names

    for count in (0, 2, 4):
        ranks.run(Path(",".join(str(folder / f"{name}.yaml") for name in runs(count))), count, program=SEVERAL)
    packs = [record["packs"] for record in ranks.records(folder / "none-fsdp-4")]
    assert {2, 4} == set(packs), "some steps have fewer packs than ranks"
    for count in (2, 4):
        for name in runs(count):
            assert_equal(folder, name, name[:-1] + "0")


def test_one_process_encodes_while_the_others_wait(tmp_path: Path) -> None:
    order: list[str] = []

    def encode(_: int) -> None:  # the lock belongs to an open file, so that threads meet it as processes do
        with Cache(str(tmp_path)).turn("the same data"):
            order.append("in")
            time.sleep(0.2)
            order.append("out")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(encode, range(3)))
    assert order[:2] == ["in", "out"], "the first was alone"
    assert len(order) == 6


def test_one_process_needs_no_group() -> None:
    with dist.joined(torch.device("cpu"), 1.0):
        assert not dist.is_joined()
        assert dist.agree(3) == 3
        assert dist.from_main("x") == "x"


def test_the_short_form_hands_on_exactly_what_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import run as torchrun

    from sftx.cli import main

    given = {"model": "m", "data": {"train": "d"}, "output": "o", "batch": {"steps": 3}}
    (tmp_path / "run.yaml").write_text(json.dumps(given), encoding="utf-8")
    seen: list[Any] = []
    monkeypatch.setattr(torchrun, "main", lambda words: seen.append((words, load_config(words[-1]))))
    assert main(["train", str(tmp_path / "run.yaml"), "seed=7", "nproc=3"]) == 0
    words, config = seen[0]
    assert "--nproc-per-node=3" in words
    assert config == load_config(str(tmp_path / "run.yaml"), ["seed=7"])
    assert main(["train", str(tmp_path / "run.yaml"), "nproc=many"]) == 2
