"""Compiled layers: the numbers of eager ones, one graph for packs of every size, and a way back
where it fails.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import test_loss
import tiny
import torch
from torch._dynamo.utils import counters
from transformers.integrations import moe

from sftx.data.pack import build_pack
from sftx.model import compile
from sftx.model.adapter import attach
from sftx.model.checkpointing import recompute
from sftx.model.compile import compile_layers, planned
from sftx.model.pack_loss import PackLoss, Paths, to_tensors
from sftx.model.runtime import Machine
from sftx.settings.schema import Adapter
from sftx.training.loop import train
from sftx.types import UserError

CPU = torch.device("cpu")
MACHINE = Machine(CPU, torch.float32)
PACKS = [
    build_pack(tiny.examples(lengths)) for lengths in ([5, 20, 9], [31], [7, 8, 9, 10, 40], [3, 2])
]


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the generated code, which takes a compiler and minutes."""
    monkeypatch.setattr(compile, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


def gradients(loss: PackLoss) -> list[torch.Tensor]:
    found = []
    for pack in PACKS:
        loss.zero_grad()
        torch.manual_seed(3)
        value = loss(to_tensors(pack, CPU))
        value.backward()
        found += [
            value.detach(),
            *(p.grad.clone() for p in loss.parameters() if p.grad is not None),
        ]
    return found


def difference(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(ours, reference, strict=True)]
    return float(
        (sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)) ** 0.5
    )


def make(family: str, adapter: str = "none", recomputed: int = 0, dropout: float = 0.1) -> PackLoss:
    if family in ("Mixtral", "Qwen3Moe") and not hasattr(moe, "_grouped_mm_fallback_backward_fake"):
        pytest.skip("this transformers computes experts on a CPU in a loop that cannot be traced")
    changes: dict[str, Any] = (
        {"attn_pdrop": 0.0} if family == "GPT2" else test_loss.FAMILIES[family]
    )  # GPT-2 keeps other dropout
    model = tiny.model(family, num_hidden_layers=3, **changes)
    if adapter == "lora":
        attach(model, Adapter.model_validate({"method": "lora", "dropout": dropout}), 0)
    recompute(model, recomputed)
    return PackLoss(model).train()


def check(loss: PackLoss, tolerance: float, graphs: int) -> None:
    reference, names = gradients(loss), list(loss.model.state_dict())
    said = compile_layers(loss, PACKS[0], MACHINE, "on")
    assert said.startswith("3 layers compiled in ")
    assert all(p.grad is None for p in loss.parameters())
    assert list(loss.model.state_dict()) == names
    assert difference(gradients(loss), reference) <= tolerance
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    with torch.no_grad():
        before = loss.eval()(to_tensors(PACKS[2], CPU))
        loss.use_segments(False)
        graphs = counters["stats"]["unique_graphs"]
        loss.model(input_ids=torch.arange(3, 9)[None])
        assert counters["stats"]["unique_graphs"] == graphs  # generation and reference stay eager
        loss.use_segments(True)
        assert torch.equal(loss(to_tensors(PACKS[2], CPU)), before)


@pytest.mark.long
@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    ("family", "options", "graphs"),
    [
        ("Llama", {}, 1),
        (
            "Llama",
            {"adapter": "lora", "recomputed": 1},
            2,
        ),  # the first input needs no gradient; kept or recomputed
        ("Qwen3", {}, 1),
        ("Gemma2", {}, 3),  # with and without a window, and packs shorter than the window
        ("GPT2", {}, 1),
        ("Mixtral", {}, 2),  # what is counted of routers has one length first, then any
        ("Llama", {"adapter": "lora", "dropout": 0.0}, 2),  # its layers as one autograd function
    ],
)
def test_one_graph_serves_every_pack(family: str, options: dict[str, Any], graphs: int) -> None:
    check(make(family, **options), 0.0, graphs)


@pytest.mark.long
@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("recomputed", [0, 2])
def test_routers_are_watched_in_a_graph_as_without_one(recomputed: int) -> None:
    loss = make("Mixtral", recomputed=recomputed)
    reference = routed(loss)
    compile_layers(loss, PACKS[0], MACHINE, "on")
    torch.testing.assert_close(routed(loss), reference, rtol=1e-6, atol=0)
    assert not counters["graph_break"]


def routed(loss: PackLoss) -> torch.Tensor:
    """What the routers did with the tokens of all packs."""
    loss.routers.restart()
    for pack in PACKS:
        # A pack without numbers of its examples is one that fills.
        numbered = replace(pack, examples=tuple(range(len(pack.cu_seqlens) - 1)))
        loss(to_tensors(numbered, CPU)).backward()
    return loss.routers.sums(CPU).clone()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="generated code needs a C++ compiler")
@pytest.mark.parametrize("family", test_loss.FAMILIES)
def test_generated_code_has_the_gradients_of_eager_layers(family: str) -> None:
    torch._dynamo.reset()
    loss = make(family)
    reference = gradients(loss)
    compile_layers(loss, PACKS[0], MACHINE, "on")
    assert difference(gradients(loss), reference) <= 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_what_does_not_compile_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = make("Llama")
    reference = gradients(loss)
    layer: Any = loss.model.model.layers[1].mlp
    own = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: (torch._dynamo.graph_break(), own(x))[1])
    said = compile_layers(loss, PACKS[0], MACHINE, "auto")
    assert said.startswith("the layers of LlamaForCausalLM do not compile: ")
    assert said.endswith("; they run as they are")
    assert difference(gradients(loss), reference) == 0
    loss.take(Paths(isolate=False))
    with pytest.raises(UserError, match=r"runtime\.compile: .*segments that are kept apart"):
        compile_layers(loss, PACKS[0], MACHINE, "on")


def test_the_number_of_ranks_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = planned("auto", CPU, 135_000_000, 1_000_000)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert planned("auto", CPU, 135_000_000, 1_000_000) == alone is True


def test_compiling_has_to_repay() -> None:
    million = 1_000_000
    assert planned("on", CPU, million, 1.0)
    assert not planned("on", CPU, million, 0.0)  # no step is taken
    assert not planned("off", CPU, 135 * million, million)
    assert [planned("auto", CPU, 135 * million, tokens) for tokens in (50_000, million)] == [
        False,
        True,
    ]
    gpu = torch.device("cuda")
    assert [planned("auto", gpu, 600 * million, tokens * million) for tokens in (1, 50)] == [
        False,
        True,
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_the_setting_reaches_the_layers_and_changes_nothing(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")

    def run(wish: Literal["auto", "on", "off"]) -> tuple[float | None, float, list[str]]:
        result = train(
            model=path,
            output=str(tmp_path / wish),
            batch={"steps": 2},
            data={
                "rows": [[f"What is {i}?", "A number."] for i in range(8)],
                "cache": str(tmp_path / "cache"),
                "eval_split": 0.25,
            },
            runtime={"progress": False, "device": "cpu", "threads": 1, "compile": wish},
        )
        assert result.eval_after is not None
        facts = (tmp_path / wish / "run.json").read_text()
        return (
            result.loss,
            result.eval_after["loss"],
            [line for line in facts.split("\n") if "compiled" in line],
        )

    off, on = run("off"), run("on")
    assert off[:2] == on[:2]
    assert not off[2]
    assert len(on[2]) == 1
    assert counters["stats"]["unique_graphs"] == 2  # training and evaluation

    assert "layers compiled in" in on[2][0]
