"""Token accuracy: the share of targets, by weight, that the model itself would choose."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedModel

import sftx
from sftx.cli import main
from sftx.data.encoder import Encoded
from sftx.data.pack import build_pack, probe_pack
from sftx.data.store.block import make_block
from sftx.data.store.corpus import Corpus, Origin, Part
from sftx.eval.loss import held_out_loss
from sftx.model import compile
from sftx.model.checks.start import check_paths
from sftx.model.compile import compile_layers
from sftx.model.loss import LogitTransform, fused_cross_entropy_sum
from sftx.model.pack_loss import PackLoss, Paths, to_tensors
from sftx.model.runtime import Machine
from sftx.settings.schema import Loss
from sftx.training.step import train_step
from sftx.types import Example

CPU = torch.device("cpu")
LENGTHS = [5, 40, 2, 23, 64, 9, 31]
VARIANTS = [
    {},
    {"dft": True},
    {"z_loss": 1e-3},
    {"label_smoothing": 0.3},
    {"dft": True, "z_loss": 1e-3, "label_smoothing": 0.3},
]


def greedy(model: PreTrainedModel, length: int, seed: int) -> Example:
    """Tokens of which the model would choose about half, with real-valued weights."""
    rng = np.random.RandomState(seed)
    ids = rng.randint(3, 264, length)
    with torch.no_grad():
        for at in range(1, length):
            if rng.rand() < 0.5:
                logits = model(input_ids=torch.tensor(ids[None, :at]), use_cache=False).logits[
                    0, -1
                ]
                ids[at] = int(logits.argmax())
    weights = ((rng.rand(length) < 0.7) * rng.rand(length) * 2).astype(np.float32)
    weights[-1] = 1.0
    return Example(ids.astype(np.int32), weights)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.model()


@pytest.fixture(scope="module")
def data(model: PreTrainedModel) -> list[Example]:
    return [greedy(model, length, seed) for seed, length in enumerate(LENGTHS)]


def naive(model: PreTrainedModel, data: list[Example]) -> float:
    """Example by example and token by token, from the logits of the model's own forward."""
    right = whole = 0.0
    with torch.no_grad():
        for example in data:
            ids = torch.tensor(example.ids.astype(np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0].double().numpy()
            for at in range(1, len(example.ids)):
                chosen = int(np.argmax(logits[at - 1]))
                weight = float(example.weights[at])
                right += weight if chosen == int(example.ids[at]) else 0.0
                whole += weight
    return right / whole


def step_accuracy(loss: PackLoss, data: list[Example], packs: list[tuple[int, ...]]) -> float:
    """What a step says whose update changes nothing."""
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    tensors = [to_tensors(build_pack([data[i] for i in members]), CPU) for members in packs]
    weight = sum(float(example.weights.astype(np.float64).sum()) for example in data)
    return train_step(loss, optimizer, tensors, weight, 0.0, 0.0, nullcontext).read()[1]


@pytest.mark.parametrize("objective", VARIANTS, ids=str)
def test_a_step_says_the_naive_share_however_it_is_cut_and_whatever_the_objective(
    model: PreTrainedModel,
    data: list[Example],
    objective: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = naive(model, data)
    assert 0.3 < expected < 0.7
    loss = PackLoss(tiny.model(), Loss(**objective))
    assert check_paths(loss, probe_pack(data), torch.float32, longest=64) == []
    for packs in ([tuple(range(7))], [(i,) for i in range(7)], [(6, 1), (), (0, 5, 2, 4, 3)]):
        assert step_accuracy(loss, data, packs) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr("sftx.model.loss.CHUNK_BYTES", 3 * 4 * 264)
    assert step_accuracy(loss, data, [tuple(range(7))]) == pytest.approx(expected, abs=1e-12)
    loss.take(Paths(transform=None))  # from the model's own logits
    assert step_accuracy(loss, data, [(0, 1, 2), (3, 4, 5, 6)]) == pytest.approx(
        expected, abs=1e-12
    )
    for padded in (False, True):  # one segment at a time, and as the rows of a batch
        loss.take(Paths(isolate=False, padded=padded))
        assert step_accuracy(loss, data, [(0, 1, 2), (3, 4, 5, 6)]) == pytest.approx(
            expected, abs=1e-12
        )


@pytest.mark.slow
def test_compiled_layers_say_the_same(data: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    model = tiny.model()
    expected = naive(model, data)
    loss = PackLoss(model)
    compile_layers(loss, build_pack(data[3:]), Machine(CPU, torch.float32), "on")
    assert step_accuracy(loss, data, [(0, 1, 2), (3, 4, 5, 6)]) == pytest.approx(
        expected, abs=1e-12
    )


def test_in_half_precision_it_is_the_argmax_of_the_logits_that_are_served() -> None:
    """Rounded to bf16, logits often tie: the first of them is chosen, as greedy decoding does."""
    torch.manual_seed(0)
    hidden, head = torch.randn(400, 8), torch.randn(300, 8)
    served = (hidden.bfloat16() @ head.bfloat16().t()).float().numpy()
    label = torch.tensor(np.where(np.arange(400) % 2, served.argmax(-1), 7))
    last = 299 - served[:, ::-1].argmax(-1)  # the last of those that tie
    assert (served.argmax(-1) != last).sum() > 5
    label[::4] = torch.tensor(last[::4])
    weight = torch.rand(400)
    with torch.autocast("cpu", torch.bfloat16):
        _, correct = fused_cross_entropy_sum(hidden, head, None, label, weight, LogitTransform())
    right = served.argmax(-1) == label.numpy()
    assert float(correct) == pytest.approx(float(weight.double().numpy()[right].sum()), abs=1e-12)


def test_of_equal_logits_the_first_is_chosen() -> None:
    weight, label = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 0])
    flat = torch.zeros(3, 8), torch.zeros(50, 8)
    _, correct = fused_cross_entropy_sum(*flat, None, label, weight, LogitTransform())
    assert float(correct) == 5.0


def test_held_out_it_is_the_naive_share_of_all_and_of_each_source(
    model: PreTrainedModel, data: list[Example]
) -> None:
    sources = {"short": data[:3], "long": data[3:]}
    parts = [
        Part(make_block([(i, i, Encoded([each])) for i, each in enumerate(some)]), number, 0, 1)
        for number, some in enumerate(sources.values())
    ]
    corpus = Corpus(parts, list(sources), [Origin("memory", "row")])
    loss = PackLoss(tiny.model())
    for tokens_per_pack in (1, 64, 10_000):
        numbers = held_out_loss(loss, corpus, tokens_per_pack, nullcontext)
        assert numbers["accuracy"] == pytest.approx(naive(model, data), abs=1e-12)
        for name, some in sources.items():
            assert numbers[f"accuracy of {name}"] == pytest.approx(naive(model, some), abs=1e-12)
            expected = float(tiny.naive_loss(model, some).detach())
            assert numbers[f"loss of {name}"] == pytest.approx(expected, rel=1e-5)


def test_a_run_records_prints_and_returns_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.folder(tmp_path / "model")
    rows = [["a", "river"]] * 8
    settings: dict[str, Any] = {
        "data": {"rows": rows, "eval_rows": rows[:2], "cache": str(tmp_path / "cache")},
        "batch": {"examples_per_step": 4, "epochs": 8},
        "optim": {"learning_rate": 3e-2},
        "eval": {"every": 4},
        "runtime": {"device": "cpu", "threads": 1},
    }
    result = sftx.train(model=path, output=str(tmp_path / "run"), **settings)
    assert result.eval_before is not None
    assert result.eval_after is not None
    assert result.eval_before["accuracy"] < 0.2 < 0.4 < result.eval_after["accuracy"]
    first, *steps = result.metrics
    assert first.accuracy is None
    assert result.accuracy == steps[-1].accuracy
    assert all(record.accuracy is not None and 0 <= record.accuracy <= 1 for record in steps)
    shown = capsys.readouterr()
    assert f"accuracy {100 * result.eval_after['accuracy']:.1f} %" in shown.out + shown.err
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[:2])), encoding="utf-8")
    answer = str(tmp_path / "numbers.json")
    verb = ["eval", str(tmp_path / "run"), str(tmp_path / "rows.jsonl"), "prompts=0"]
    assert main([*verb, f"json={answer}", "runtime.device=cpu", "min.accuracy=0.4"]) == 0
    numbers = json.loads(Path(answer).read_text(encoding="utf-8"))["model"]["numbers"]
    assert numbers["accuracy"] == pytest.approx(result.eval_after["accuracy"], abs=1e-6)
