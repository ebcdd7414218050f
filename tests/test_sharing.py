"""Shared prefixes give the loss and the gradients of separate examples: each alone in float64
through the plain model is the oracle.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_compiled
import tiny
import torch
from hypothesis import given, settings
from test_isolation import BY_LENGTH, alone_in_float64, sharpened
from test_prefix_attention import flash_backward, flash_forward
from trees import BUSHY, Tree, tree_of, trees

from sftx.data.pack import build_pack, probe_pack
from sftx.model import attention, compile, prefix_attention, prefix_blocks
from sftx.model.adapter import attach
from sftx.model.checkpointing import recompute
from sftx.model.checks import sharing, start
from sftx.model.checks.start import check_paths
from sftx.model.compile import compile_layers
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.model.runtime import Machine
from sftx.settings.schema import Adapter, Loss
from sftx.types import Pack

CPU = torch.device("cpu")


def allowed(model: Any, objective: Loss | None = None) -> PackLoss:
    loss = PackLoss(model, objective or Loss())
    loss.take(replace(loss.paths, shares_prefixes=True))
    return loss


def differences(loss: PackLoss, tree: Tree, reference: Any) -> tuple[float, float]:
    """Relative differences of loss and gradients from `reference`, which is plain and float64."""
    reference.zero_grad()
    value = tiny.naive_loss(reference, tree.examples)
    value.backward()
    weight = sum(float(example.weights[1:].astype(float).sum()) for example in tree.examples)
    loss.zero_grad()
    ours = loss(to_tensors(tree.pack, CPU)) / weight
    ours.backward()
    return (
        abs(float(ours.detach()) / float(value.detach()) - 1),
        tiny.gradient_difference(loss.model, reference),
    )


@pytest.fixture(scope="module")
def llama() -> tuple[PackLoss, Any]:
    reference = sharpened("Llama", {}).double()
    return allowed(copy.deepcopy(reference)), reference


@settings(max_examples=12, deadline=None)
@given(tree=trees())
def test_any_tree_has_the_loss_and_gradient_of_its_examples(
    llama: tuple[PackLoss, Any], tree: Tree
) -> None:
    """In float64; sums of weights, norms and rotary embeddings are float32 there too."""
    if any(example.targets for example in tree.examples):
        value, gradient = differences(llama[0], tree, llama[1])
        assert value < 1e-6
        assert gradient < 1e-6


def test_float32_is_as_near_as_separate_examples_are() -> None:
    model = sharpened("Llama", {})
    reference = copy.deepcopy(model).double()
    loss = allowed(model)
    value, gradient = differences(loss, BUSHY, reference)
    _, unshared = differences(loss, replace(BUSHY, pack=build_pack(BUSHY.examples)), reference)
    assert value < 1e-6
    assert gradient < max(1e-6, 1.5 * unshared)


def test_a_tree_without_parents_is_a_plain_pack() -> None:
    tree = tree_of([-1, -1, -1], [9, 4, 20], [0, 1, 2])
    pack, plain = to_tensors(tree.pack, CPU), to_tensors(build_pack(tree.examples), CPU)
    assert not pack.prefixes
    assert pack.counts == plain.counts
    assert torch.equal(pack.index, plain.index)


def test_a_tree_of_empty_branches_is_a_plain_pack() -> None:
    tree = tree_of([-1, 0, 1, -1], [9, 0, 0, 5], [2, 3])
    pack = to_tensors(tree.pack, CPU)
    assert not pack.prefixes
    assert sum(pack.counts) == len(pack.index)


def test_a_tree_in_several_packs_gives_the_same_sum() -> None:
    """As packs of one rank or of several are: what they share is computed in each."""
    parents, lengths = [-1, 0, 0, 0, 3], [30, 9, 14, 5, 8]
    whole = tree_of(parents, lengths, [1, 2, 3, 4])
    model = sharpened("Llama", {}).double()
    loss = allowed(model)
    values, gradients = [], []
    for packs in ([whole.pack], [_kept(whole.pack, [0, 1, 2]), _kept(whole.pack, [0, 3, 4])]):
        loss.zero_grad()
        total = torch.stack([loss(to_tensors(pack, CPU)) for pack in packs]).sum()
        total.backward()
        values.append(float(total.detach()))
        gradients.append(
            torch.cat([p.grad.flatten() for p in loss.parameters() if p.grad is not None])
        )
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-6


def _kept(pack: Pack, segments: list[int]) -> Pack:
    """A pack of some of the segments; the targets in the root count in the pack that has segment 1."""
    assert pack.parent is not None
    bounds = pack.cu_seqlens
    places = np.concatenate([np.arange(bounds[s], bounds[s + 1]) for s in segments])
    parent = np.array([segments.index(p) if p >= 0 else -1 for p in pack.parent[segments]])
    # The segment in which each target's label stands: labels are grouped by it.
    owners, at = [], 0
    for index, label in zip(pack.index, pack.label, strict=True):
        following = [s for s in range(len(bounds) - 1) if pack.ids[bounds[s]] == label]
        inside = int(np.searchsorted(bounds, index, side="right")) - 1
        last = index + 1 == bounds[inside + 1]
        at = next(s for s in following if pack.parent[s] == inside and s >= at) if last else inside
        owners.append(at)
    wanted = segments if 1 in segments else segments[1:]
    kept = np.isin(owners, wanted)
    back = {int(place): i for i, place in enumerate(places)}
    return Pack(
        ids=pack.ids[places],
        positions=pack.positions[places],
        cu_seqlens=np.cumsum([0, *np.diff(bounds)[segments]]).astype(np.int32),
        index=np.array([back[int(i)] for i in pack.index[kept]], np.int32),
        label=pack.label[kept],
        weight=pack.weight[kept],
        parent=parent.astype(np.int32),
    )


@pytest.mark.parametrize("objective", [{"label_smoothing": 0.1}, {"dft": True}, {"z_loss": 1e-2}])
def test_what_the_objective_adds_is_shared_too(objective: dict[str, Any]) -> None:
    """The packed loss of separate examples, which other tests hold against formulas, is the oracle."""
    model = sharpened("Llama", {}).double()
    found = []
    for pack in (BUSHY.pack, build_pack(BUSHY.examples)):
        loss = allowed(model, Loss.model_validate(objective))
        loss.zero_grad()
        value = loss(to_tensors(pack, CPU))
        value.backward()
        found.append((float(value.detach()), [p.grad.clone() for p in model.parameters()]))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    pairs = list(zip(our_gradients, their_gradients, strict=True))
    apart = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    assert apart < 1e-12 * sum(float((b**2).sum()) for _, b in pairs)


@pytest.mark.parametrize("recomputed", [0, 2])
def test_an_adapter_shares_and_so_do_checkpointed_layers(recomputed: int) -> None:
    model = sharpened("Llama", {})
    attach(model, Adapter.model_validate({"method": "lora", "dropout": 0.0}), 0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    reference = copy.deepcopy(model).double()
    recompute(model, recomputed)
    value, gradient = differences(allowed(model).train(), BUSHY, reference)
    assert value < 1e-6
    assert gradient < 2e-6


@pytest.mark.slow
def test_compiled_layers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all packs with shared prefixes, however deep."""
    monkeypatch.setattr(compile, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    model = sharpened("Llama", {})
    reference = copy.deepcopy(model).double()
    loss = allowed(model).train()
    compile_layers(loss, BUSHY.pack, Machine(CPU, torch.float32), "on")
    graphs = test_compiled.counters["stats"]["unique_graphs"]
    flat = tree_of([-1, 0, 0, -1], [20, 7, 9, 5], [1, 2, 3])
    for tree in (BUSHY, flat):
        value, gradient = differences(loss, tree, reference)
        assert value < 1e-6
        assert gradient < 2e-6
    assert test_compiled.counters["stats"]["unique_graphs"] == graphs
    assert not test_compiled.counters["graph_break"]


SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "a window": ("Mistral", {"sliding_window": 8}),
    "two kinds of layers": (
        "Gemma3Text",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "soft-capping": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 3.0},
    ),
    "sinks": (
        "GptOss",
        {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "learned positions": ("GPT2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "experts": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.mark.parametrize(
    "what",
    [
        what if what in ("a window", "sinks") else pytest.param(what, marks=pytest.mark.slow)
        for what in SHARING
    ],
)
def test_what_passes_the_check_is_exact(what: str) -> None:
    family, changes = SHARING[what]
    if tiny.runs_one_at_a_time(family):
        pytest.skip("this transformers lacks what keeps its segments apart")
    model = sharpened(family, changes).eval()
    value, kept = alone_in_float64(model, BUSHY.examples)
    loss = PackLoss(model).eval()
    said = check_paths(loss, probe_pack(BUSHY.examples), torch.float32, 120, 2048, share=True)
    assert loss.paths.shares_prefixes, said
    weight = sum(float(example.weights[1:].astype(float).sum()) for example in BUSHY.examples)
    ours = loss(to_tensors(BUSHY.pack, CPU)) / weight
    ours.backward()
    assert float(ours.detach()) == pytest.approx(value, rel=1e-6)
    assert tiny.gradient_difference(model, kept) < 3e-6


def test_what_runs_one_at_a_time_does_not_share() -> None:
    family, changes = BY_LENGTH["attention in chunks"]
    loss = PackLoss(sharpened(family, changes))
    probe = probe_pack(BUSHY.examples)
    said = check_paths(loss, probe, torch.float32, 120, 2048, share=True)
    assert "cannot keep packed segments apart" in said[0]
    assert not loss.paths.shares_prefixes


@pytest.mark.parametrize(
    ("changes", "objective", "why"),
    [
        ({}, {"neftune_alpha": 5.0}, "loss.neftune_alpha draws noise"),
        ({"attention_dropout": 0.1}, {}, "was not found to give the same"),
    ],
)
def test_what_is_random_by_example_does_not_share(
    changes: dict[str, Any], objective: dict[str, Any], why: str
) -> None:
    loss = PackLoss(sharpened("Llama", changes), Loss.model_validate(objective))
    probe = probe_pack(BUSHY.examples)
    (said,) = check_paths(loss, probe, torch.float32, 120, 2048, share=True)
    assert why in said
    assert loss.paths.isolate
    assert not loss.paths.shares_prefixes
    assert check_paths(loss, probe, torch.float32, 120, 2048) == []
    with pytest.raises(AssertionError, match="did not allow"):
        loss(to_tensors(BUSHY.pack, CPU))


@pytest.mark.parametrize("fault", ["a gradient", "the model itself"])
def test_a_fault_in_sharing_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roots are right in both: packed segments stay apart, and only sharing is off."""
    if fault == "a gradient":
        add_to = prefix_blocks._Block.add_to

        def forgets_ancestors(block: Any, total: Any, part: Any) -> None:
            add_to(block, total, part)
            for place in block.places[:-1]:
                total[:, place] *= 0.99

        monkeypatch.setattr(prefix_blocks._Block, "add_to", forgets_ancestors)
    else:
        monkeypatch.setattr(start, "apart", lambda *_: 1.0)
    loss = PackLoss(sharpened("Llama", {}))
    (said,) = check_paths(loss, probe_pack(BUSHY.examples), torch.float32, 120, 2048, share=True)
    assert "was not found to give the same" in said
    assert loss.paths.isolate
    assert not loss.paths.shares_prefixes


def test_the_model_itself_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = PackLoss(sharpened("Llama", {})).eval()
    probe = to_tensors(probe_pack(BUSHY.examples), CPU)
    with torch.no_grad():
        assert sharing.apart(loss, probe) < 1e-5
        families = prefix_blocks.families_of
        monkeypatch.setattr(
            prefix_blocks,
            "families_of",
            lambda *given: [family._replace(chain=[]) for family in families(*given)],
        )
        assert sharing.apart(loss, probe) > 1e-2


def test_kernels_are_held_against_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention is a stand-in here: what is tried is the comparison."""
    monkeypatch.setattr(prefix_attention, "_flash_forward", flash_forward)
    monkeypatch.setattr(prefix_attention, "_flash_backward", flash_backward)
    assert sharing.kernels_agree(CPU, torch.bfloat16)

    def wrong(*given: Any) -> Any:
        q, k, v = flash_backward(*given)
        return q, k * 1.1, v

    monkeypatch.setattr(prefix_attention, "_flash_backward", wrong)
    assert not sharing.kernels_agree(CPU, torch.bfloat16)


def test_an_accelerator_shares_without_reading_anything_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On tensors without data: whatever asks the device for a value raises there."""
    kernels = []
    shared = attention.shared_segments
    monkeypatch.setattr(
        attention, "shared_segments", lambda *a: kernels.append(a[-1]) or shared(*a)
    )
    # There is no autocast on tensors without data: the weights are bf16 instead.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    meta = torch.device("meta")
    loss = allowed(tiny.model("Llama")).to(meta, torch.bfloat16)
    value = loss(to_tensors(BUSHY.pack, meta))
    value.backward()
    assert kernels == [True, True]


def test_parts_of_a_tree_are_refused() -> None:
    pack: Pack = BUSHY.pack
    with pytest.raises(AssertionError, match="do not stand alone"):
        list(to_tensors(pack, CPU).parts())
