"""Several ranks: the same numbers as one, checkpoints for any number, and one end for all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from sftx import distributed
from sftx.data.store.cache import Cache
from sftx.model.load import load_model
from sftx.model.shard import unread_model
from sftx.settings.load import load_config
from sftx.settings.schema import Model
from sftx.types import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    ranks.model(made / "model")
    return made


def write(folder: Path, name: str, **changes: Any) -> Path:
    return ranks.write_run(folder, str(folder / "model"), name, **changes)


def assert_equal(folder: Path, name: str, reference: str, weights: float = 1e-6) -> None:
    """Every number of the record that is not of the machine, and the weights, within `weights`."""
    ours, theirs = ranks.records(folder / name), ranks.records(folder / reference)
    machine = {"seconds", "seconds_left", "tokens_per_second", "memory", "packs"}
    for mine, other in zip(ours, theirs, strict=True):
        for key in mine.keys() - machine:
            if key == "eval" and other[key]:
                assert mine[key] == pytest.approx(other[key], rel=1e-6), (name, mine["step"])
            elif key in ("loss", "grad_norm", "accuracy"):
                assert mine[key] == pytest.approx(other[key], abs=1e-6 * max(1, abs(other[key]))), (
                    name,
                    mine["step"],
                )
            else:
                assert mine[key] == other[key], (name, key)
    assert ranks.difference(folder / name, folder / reference) < weights
    for when in ("eval_before", "eval_after"):
        mine, other = ranks.facts(folder / name)[when], ranks.facts(folder / reference)[when]
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)


def test_two_ranks_with_a_rank_that_has_no_pack_train_as_one_does(folder: Path) -> None:
    """The quick one: two shards, three packs for them in the last step, sftx's own launcher."""
    changes: dict[str, Any] = {
        "batch": {"epochs": 9 / 35},
        "runtime": {"tokens_per_pack": 1, "parallel": "fsdp"},
    }
    ranks.run(write(folder, "quick-1", **changes), 0)
    path = write(folder, "quick-2", **changes)
    output = ranks.run(path, 0, program=["-m", "sftx", "train", "nproc=2"])
    assert [record["packs"] for record in ranks.records(folder / "quick-2")] == [4, 4, 1]
    assert_equal(folder, "quick-2", "quick-1")
    assert output.count("plan     3 steps") == 1, "only rank 0 prints"


@pytest.mark.long
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
        ranks.together([folder / f"{name}.yaml" for name in runs(count)], count)
    packs = [record["packs"] for record in ranks.records(folder / "none-fsdp-4")]
    assert {2, 4} == set(packs), "some steps have fewer packs than ranks"
    for count in (2, 4):
        for name in runs(count):
            assert_equal(folder, name, name[:-1] + "0")


@pytest.mark.slow
def test_padded_batches_on_two_ranks_give_the_numbers_of_one_process(folder: Path) -> None:
    """Every rank runs equally many batches, in evaluations too."""
    model = tiny.folder(folder / "bloom", family="Bloom", n_layer=2, n_head=4)
    for name, count in (("padded-1", 0), ("padded-2", 2)):
        runtime = {"tokens_per_pack": 150, "parallel": "fsdp" if count else "auto"}
        ranks.run(ranks.write_run(folder, model, name, runtime=runtime), count)
        assert ranks.facts(folder / name)["padded"]
    # Batches of other sizes round otherwise, and AdamW makes steps of 3e-3 of the smallest gradient.
    assert_equal(folder, "padded-2", "padded-1", weights=1e-5)


GATHERED = """
import sys
from pathlib import Path
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
from sftx.settings.load import load_config
from sftx.training import memory_plan
from sftx.training.loop import train

own, calls = fsdp.foreach_all_gather, []
fsdp.foreach_all_gather = lambda *args: (calls.append(1), own(*args))[1]
as_chosen = memory_plan._gathered
for path in sys.argv[1].split(","):
    config = load_config(path)
    again = "again" in config.output
    memory_plan._gathered = (lambda chosen, *_: chosen) if again else as_chosen
    calls.clear()
    train(config)
    Path(config.output, "gathers").write_text(str(len(calls)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "lora"])
def test_weights_gathered_once_a_step_give_the_same_to_the_bit(folder: Path, method: str) -> None:
    program = folder / "gathered.py"
    program.write_text(GATHERED, encoding="utf-8")
    gathers = []
    for name in (f"once-{method}", f"again-{method}"):
        path = write(
            folder,
            name,
            adapter=method,
            batch={"epochs": 5 / 9},
            runtime={"parallel": "fsdp", "tokens_per_pack": 24},
            eval={"every": 2},
            checkpoint={"every": 2},
        )
        ranks.run(path, 2, program=[str(program)])
        gathers.append(int((folder / name / "gathers").read_text()))
    once, again = (ranks.records(folder / f"{name}-{method}") for name in ("once", "again"))
    assert once[0]["packs"] > 2  # of two ranks
    for ours, theirs in zip(once, again, strict=True):
        assert (ours["loss"], ours["eval"]) == (theirs["loss"], theirs["eval"])
    assert ranks.difference(folder / f"once-{method}", folder / f"again-{method}") == 0
    assert gathers[0] < 0.7 * gathers[1]


@pytest.mark.long
def test_four_ranks_that_gather_once_a_step_give_the_numbers_of_one_process(folder: Path) -> None:
    """Several packs on each rank, in one group of shards and in two: once and again are the same to
    the bit.
    """
    program = folder / "gathered.py"
    program.write_text(GATHERED, encoding="utf-8")

    def written(name: str, parallel: str, method: str) -> Path:
        return write(
            folder,
            name,
            adapter={"method": method, "rank": 4} if method != "none" else {},
            batch={"examples_per_step": 12, "epochs": 1},
            runtime={"parallel": parallel, "tokens_per_pack": 24},
        )

    ranks.together([written(f"one-{m}", "auto", m) for m in ("none", "lora")], 0)
    several = [(p, m) for p in ("fsdp", "hsdp") for m in ("none", "lora")]
    paths = [written(f"{how}-{p}-{m}", p, m) for p, m in several for how in ("once", "again")]
    ranks.run(Path(",".join(map(str, paths))), 4, program=[str(program)])
    for parallel, method in several:
        once, again = folder / f"once-{parallel}-{method}", folder / f"again-{parallel}-{method}"
        assert min(record["packs"] for record in ranks.records(once)[:2]) > 4
        assert ranks.difference(once, again) == 0
        assert [r["loss"] for r in ranks.records(once)] == [r["loss"] for r in ranks.records(again)]
        gathers = [int((each / "gathers").read_text()) for each in (once, again)]
        assert gathers[0] < 0.7 * gathers[1]
        assert_equal(folder, once.name, f"one-{method}")


TRACED = """
import sys
from sftx.model import compile
from sftx.settings.load import load_config
from sftx.training.loop import train

compile.COMPILER = "aot_eager"  # everything but the generated code, which takes minutes
compile._ASSUMED["cpu"] = (1e-9, 0.1, 2e11)  # compiling repays itself in any run
for path in sys.argv[1].split(","):
    train(load_config(path))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", pytest.param("lora", marks=pytest.mark.long)])
def test_compiled_recomputed_layers_in_bf16_and_in_shards_are_those_that_are_kept(
    folder: Path, method: str
) -> None:
    (folder / "traced.py").write_text(TRACED, encoding="utf-8")
    runs = {
        f"{method}-kept": {"recompute": "none", "compile": "off"},
        f"{method}-all": {"recompute": "all", "compile": "auto"},
    }
    same: dict[str, Any] = {"precision": "bf16", "parallel": "fsdp", "rank_timeout": 140}
    paths = [
        write(folder, name, runtime=same | some, adapter={"method": method})
        for name, some in runs.items()
    ]
    ranks.run(Path(",".join(map(str, paths))), 2, program=[str(folder / "traced.py")])
    assert_equal(folder, f"{method}-all", f"{method}-kept")
    facts = ranks.facts(folder / f"{method}-all")
    assert any("3 layers compiled" in note for note in facts["notes"])
    assert facts["recomputed_layers"] == 3


@pytest.mark.slow
def test_frozen_matrices_in_bf16_shards_change_no_number(folder: Path) -> None:
    """One process and two shards, an adapter in bf16: the first loss is the same; weights differ by
    the order of sums.
    """
    same: dict[str, Any] = {"batch": {"epochs": 4 / 35}, "adapter": {"method": "lora", "rank": 4}}
    for count, parallel in ((0, "auto"), (2, "fsdp")):
        runtime = {"precision": "bf16", "parallel": parallel, "tokens_per_pack": 1}
        ranks.run(write(folder, f"half-{count}", runtime=runtime, **same), count)
    one, two = (ranks.records(folder / f"half-{count}") for count in (0, 2))
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6)
    assert ranks.difference(folder / "half-0", folder / "half-2") < 1e-3
    held = ranks.facts(folder / "half-2")["predicted"]["memory"]["weights"]
    whole = ranks.facts(folder / "half-0")["predicted"]["memory"]["weights"]
    assert held == pytest.approx(whole / 2, rel=0.02)


@pytest.mark.slow
def test_every_way_of_training_works_in_shards(folder: Path) -> None:
    """DoRA, an adapter that trains on, new tokens beside an adapter and without, frozen layers,
    noise.
    """
    untied = tiny.folder(folder / "untied", num_hidden_layers=3, tie_word_embeddings=False)
    tied, lora = str(folder / "model"), {"method": "lora", "rank": 4}
    words = {"add_tokens": ["What is", "plus"]}
    changes: dict[str, tuple[Any, dict[str, Any]]] = {
        "dora": ({"path": tied}, {"adapter": {"method": "dora", "rank": 4}}),
        "words-tied": ({"path": tied, **words}, {"adapter": lora}),
        "words-untied": ({"path": untied, **words}, {"adapter": lora}),
        "words-full": ({"path": tied, **words}, {}),
        "frozen": ({"path": tied, "unfrozen_layers": 1}, {}),
        "noise": (
            {"path": tied},
            {"loss": {"label_smoothing": 0.1, "z_loss": 1e-3, "neftune_alpha": 5.0}},
        ),
    }

    def run(count: int) -> None:
        paths = []
        for name, (model, sections) in changes.items():
            sections = {"batch": {"epochs": 12 / 35}, "runtime": {"parallel": "fsdp"}, **sections}
            paths.append(ranks.write_run(folder, model, f"{name}-{count}", **sections))
        more = {
            "batch": {"epochs": 12 / 35},
            "adapter": {"method": "dora", "path": str(folder / "dora-0")},
        }
        paths.append(write(folder, f"on-{count}", runtime={"parallel": "fsdp"}, **more))
        ranks.together(paths, count)

    run(0)
    run(2)
    for name in (*changes, "on"):
        assert_equal(folder, f"{name}-2", f"{name}-0")
        assert ranks.facts(folder / f"{name}-2")["predicted"]["memory"]["peak"] > 0


@pytest.mark.slow
def test_weights_in_bf16_are_rounded_in_shards_as_they_are_as_a_whole(folder: Path) -> None:
    """After one step of AdamW, whose size hardly depends on the gradient, only the random bits
    could differ.
    """
    same: dict[str, Any] = {
        "batch": {"epochs": 4 / 35},
        "optim": {"weights": "bf16_stochastic", "learning_rate": 1e-3},
    }
    for name, count, parallel in (
        ("whole", 0, "auto"),
        ("shards", 2, "fsdp"),
        ("copies", 2, "replicate"),
    ):
        runtime = {"precision": "bf16", "parallel": parallel, "tokens_per_pack": 1}
        ranks.run(write(folder, f"bf16-{name}", runtime=runtime, **same), count)
    whole, shards, copies = (
        load_file(folder / f"bf16-{name}" / "model.safetensors")
        for name in ("whole", "shards", "copies")
    )
    before = load_file(folder / "model" / "model.safetensors")
    size = sum(tensor.numel() for tensor in whole.values())
    for others in (shards, copies):
        assert sum(int((whole[name] != others[name]).sum()) for name in whole) < 0.01 * size
    assert (
        sum(int((whole[name] != before[name].bfloat16().float()).sum()) for name in whole)
        > 0.5 * size
    )


@pytest.mark.slow
def test_what_several_ranks_trained_is_merged(folder: Path) -> None:
    changes: dict[str, Any] = {
        "batch": {"epochs": 4 / 35},
        "adapter": {"method": "lora", "rank": 4, "merge": True},
    }
    path = write(folder, "merged", runtime={"parallel": "fsdp"}, **changes)
    ranks.run(path, 2)
    predicted = ranks.facts(folder / "merged")["predicted"]["memory"]
    weights = sum(
        tensor.nbytes for tensor in load_file(folder / "model" / "model.safetensors").values()
    )
    assert predicted["weights"] == pytest.approx(
        weights / 2, rel=0.2
    )  # half of it, and the adapter
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder / "model")
        adapted = PeftModel.from_pretrained(base, folder / "merged").eval()(ids).logits
        merged = (
            AutoModelForCausalLM.from_pretrained(folder / "merged" / "merged").eval()(ids).logits
        )
    assert float((merged - adapted).abs().max()) < 1e-5 * float(adapted.abs().max())


def test_one_process_encodes_while_the_others_wait(tmp_path: Path) -> None:
    order: list[str] = []

    def encode(
        _: int,
    ) -> None:  # the lock belongs to an open file, so that threads meet it as processes do
        with Cache(str(tmp_path)).turn("the same data"):
            order.append("in")
            time.sleep(0.2)
            order.append("out")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(encode, range(3)))
    assert order[:2] == ["in", "out"], "the first was alone"
    assert len(order) == 6


def test_one_process_needs_no_group() -> None:
    with distributed.joined(torch.device("cpu"), 1.0):
        assert not distributed.is_joined()
        assert distributed.all_reduce_max(3) == 3
        assert distributed.broadcast("x") == "x"


def test_the_short_form_hands_on_exactly_what_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed import run as torchrun

    from sftx.cli import main

    given = {"model": "m", "data": {"train": "d"}, "output": "o", "batch": {"steps": 3}}
    (tmp_path / "run.yaml").write_text(json.dumps(given), encoding="utf-8")
    seen: list[Any] = []
    monkeypatch.setattr(
        torchrun, "main", lambda words: seen.append((words, load_config(words[-1])))
    )
    assert main(["train", str(tmp_path / "run.yaml"), "seed=7", "nproc=3"]) == 0
    words, config = seen[0]
    assert "--nproc-per-node=3" in words
    assert config == load_config(str(tmp_path / "run.yaml"), ["seed=7"])
    assert main(["train", str(tmp_path / "run.yaml"), "nproc=many"]) == 2


DIE = """
import os, sys
from sftx import distributed
from sftx.settings.load import load_config
from sftx.training.loop import steps

for record in steps(load_config(sys.argv[1])):
    if record.step == 13:
        distributed.barrier()
        os._exit(9)
"""


@pytest.mark.long
def test_a_checkpoint_of_four_ranks_continues_on_two_and_on_one_and_back(folder: Path) -> None:
    (folder / "die.py").write_text(DIE, encoding="utf-8")
    lora: dict[str, Any] = {"adapter": {"method": "lora", "rank": 4}, "checkpoint": {"every": 5}}
    ranks.run(write(folder, "whole", **lora), 0)
    for first, then in (
        ((4, "fsdp"), (2, "replicate")),
        ((4, "hsdp"), (0, "fsdp")),
        ((0, "fsdp"), (4, "fsdp")),
    ):
        name = f"from-{first[0]}-{first[1]}-to-{then[0]}"
        path = write(folder, name, runtime={"parallel": first[1]}, **lora)
        ranks.start(path, first[0], [str(folder / "die.py")]).communicate(timeout=200)
        assert sorted(p.name for p in (folder / name / "checkpoints").iterdir()) == [
            "step-00000005",
            "step-00000010",
        ]
        assert not list((folder / name).rglob("*.metadata")), "safetensors and JSON only"
        path = write(folder, name, runtime={"parallel": then[1]}, **lora)
        output = ranks.run(path, then[0], ["-m", "sftx", "train"])
        assert "resume   after step 10" in output
        assert_equal(folder, name, "whole")


def _ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a launcher has started."""
    return [
        int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ]


def _after_step(folder: Path, name: str, step: int) -> None:
    """Wait until the run has recorded `step`."""
    metrics, end = folder / name / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert time.monotonic() < end, "the run does not go on"
        time.sleep(0.1)


LONG: dict[str, Any] = {"batch": {"epochs": 400}, "eval": {"at_start": False}}


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(folder: Path) -> None:
    process = ranks.start(
        write(folder, "signal", checkpoint={"background": True, "every": 7}, **LONG), 2
    )
    _after_step(folder, "signal", 4)
    os.kill(_ranks_of(process.pid)[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=100)
    assert "exitcode  : 75" in output
    stopped = ranks.facts(folder / "signal")["stopped_at"]
    assert (folder / "signal" / "checkpoints" / f"step-{stopped:08d}" / "MANIFEST.json").exists()
    assert len(ranks.records(folder / "signal")) == stopped


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hung", "launcher"])
def test_a_lost_rank_ends_the_job_and_is_named(folder: Path, how: str) -> None:
    path = write(folder, how, runtime={"rank_timeout": 8}, **LONG)
    process = ranks.start(path, 2, start_new_session=True)
    _after_step(folder, how, 3)
    members = _ranks_of(process.pid)
    began = time.monotonic()
    match how:
        case "killed":
            os.kill(members[1], signal.SIGKILL)
        case "hung":
            os.kill(members[1], signal.SIGSTOP)
        case "launcher":
            process.kill()
    output, _ = process.communicate(timeout=100)
    while any(Path(f"/proc/{pid}/stat").exists() and _alive(pid) for pid in members):
        assert time.monotonic() - began < 60, "a rank was left behind"
        time.sleep(0.2)
    if how == "killed":
        assert re.search(r"rank\s*: 1 \(local_rank: 1\)\s+exitcode\s*: -9", output), output
    if how == "hung":
        assert "rank 1 was last heard of at step" in output, output
    if how == "launcher":  # the ranks were told, and saved
        stopped = ranks.facts(folder / how)["stopped_at"]
        assert (folder / how / "checkpoints" / f"step-{stopped:08d}" / "MANIFEST.json").exists()


def _alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and was not waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


HANG = """
import sys, time
from sftx import distributed
from sftx.settings.load import load_config
from sftx.training.loop import steps

for record in steps(load_config(sys.argv[1])):
    while record.step == 3 and distributed.rank() == 1:
        time.sleep(0.1)
"""


@pytest.mark.slow
def test_a_rank_that_hangs_in_python_shows_where(folder: Path) -> None:
    (folder / "hang.py").write_text(HANG, encoding="utf-8")
    process = ranks.start(
        write(folder, "hang", runtime={"rank_timeout": 5}, **LONG), 2, [str(folder / "hang.py")]
    )
    output, _ = process.communicate(timeout=100)
    assert process.returncode
    assert "rank 1 was last heard of at step" in output
    assert re.search(r"Timeout \(.*\)!\n(.*\n)*.*hang\.py", output), output


MEMORY = """
import json, os, sys
from pathlib import Path
import torch
from sftx import distributed
from sftx.settings.load import load_config
from sftx.model.runtime import Machine
from sftx.model.folder import load_config as model_config
from sftx.training.build import build_model

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) << 10 for l in lines if "VmHWM" in l)

config = load_config(sys.argv[2])
torch.set_num_threads(1)
with distributed.joined(torch.device("cpu"), 60):
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = peak()
    machine = Machine(torch.device("cpu"), torch.float32)
    built = build_model(config, model_config(config.model), machine, {})
    loss, notes = built.loss, built.notes
    found = {"grew": peak() - before, "model": sum(p.nbytes for p in loss.parameters()),
        "unit": max(sum(p.nbytes for p in layer.parameters()) for layer in loss.model.model.layers),
        "notes": notes}
    # Lines printed by several ranks may mix
    Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_no_rank_ever_holds_the_model(folder: Path) -> None:
    """Peak of resident memory while the model is read, against the bytes of its weights."""
    big = tiny.folder(
        folder / "big",
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        dtype="bfloat16",
    )
    (folder / "memory.py").write_text(MEMORY, encoding="utf-8")
    grown: dict[str, list[float]] = {}
    for parallel in ("fsdp", "replicate"):
        path = ranks.write_run(folder, big, f"memory-{parallel}", runtime={"parallel": parallel})
        answers = folder / f"memory-{parallel}"
        answers.mkdir()
        process = ranks.start(path, 4, [str(folder / "memory.py"), str(answers)])
        output, _ = process.communicate(timeout=200)
        found = [json.loads(answer.read_text(encoding="utf-8")) for answer in answers.iterdir()]
        assert len(found) == 4, output
        grown[parallel] = [numbers["grew"] / numbers["model"] for numbers in found]
        imports = 64 << 20  # what torch loads for the first group, and the buffers of gloo
        allowed = (
            1 / 4 + (found[0]["unit"] + imports) / found[0]["model"]
        )  # its quarter, and one layer at a time
    assert max(grown["fsdp"]) < allowed < 0.9 < min(grown["replicate"])


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"RANK": "1"}])
def test_ranks_that_nobody_started_are_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process would train its share of every step, alone."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match="but not of MASTER_ADDR: start them with torchrun"),
        distributed.joined(CPU, 1.0),
    ):
        pass


def test_a_model_that_is_read_in_shards_generates_as_its_folder_says(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    said = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}
    GenerationConfig(**said).save_pretrained(tmp_path / "model")
    settings = Model(path=str(tmp_path / "model"))
    shards = unread_model(settings, torch.float32).model.generation_config.to_dict()
    assert shards == load_model(settings, CPU).generation_config.to_dict()
    assert said.items() <= shards.items()
