"""The one equality everything rests on: loss and gradient are those of the naive float64
computation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from sftx.data.pack import balanced, build_pack, probe_pack
from sftx.model import cpu_attention
from sftx.model.checks.start import check_paths, check_sizes
from sftx.model.loss import LogitTransform, _add_outer, cross_entropy_sum, fused_cross_entropy_sum
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.model.runtime import machine
from sftx.settings.schema import Runtime
from sftx.training.step import train_step
from sftx.types import Example, UserError

CPU = torch.device("cpu")
LENGTHS = [5, 40, 2, 23, 64, 9, 31]
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 7},
    "Gemma2": {
        "head_dim": 8,
        "sliding_window": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 3.0,
    },
    "Gemma3Text": {"head_dim": 8, "sliding_window": 8},
    "GPT2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "n_inner": 64},
    "GPTNeoX": {},
    "Phi": {},
    "Granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "Cohere": {"logit_scale": 0.25},
    "Olmo2": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}


def float64_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in float64 with plain attention, for reference."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")
    return twin


def step_gradient(loss: PackLoss, data: list[Example], packs: list[tuple[int, ...]]) -> float:
    """Gradient of one step cut into `packs`, left in `.grad`; returns the loss."""
    loss.zero_grad()
    weight = float(sum(example.weights[1:].astype(float).sum() for example in data))
    total = 0.0
    for members in packs:
        value = loss(to_tensors(build_pack([data[i] for i in members]), CPU)) / weight
        value.backward()
        total += float(value.detach())
    return total


@pytest.fixture
def as_trained() -> Iterator[None]:
    """The machine's settings of a run: oneDNN for fp32 products, allocator, threads."""
    with machine(Runtime(device="cpu", threads=1)):
        yield


@pytest.mark.usefixtures("as_trained")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradient_is_the_naive_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "ROWS", 24)  # the examples are shorter than a block
    model = tiny.model(family, **FAMILIES[family])
    data = tiny.examples(LENGTHS)
    twin = float64_twin(model)
    reference = tiny.naive_loss(twin, data)
    reference.backward()
    loss = PackLoss(model)
    notes = check_paths(loss, probe_pack(data), torch.float32, longest=200)
    assert bool(notes) == tiny.runs_one_at_a_time(family)
    for packs in (
        [tuple(range(7))],
        balanced(LENGTHS, 70)[0],
        [(i,) for i in range(7)],
        [(6, 1), (), (0, 5, 2, 4, 3)],
    ):
        value = step_gradient(loss, data, packs)
        assert value == pytest.approx(float(reference), rel=1e-6)
        assert tiny.gradient_difference(model, twin) <= 1e-6


@pytest.mark.parametrize("family", ["Falcon", "Bloom", "Mamba", "Doge"])
def test_a_model_that_cannot_be_isolated_runs_in_padded_batches(family: str) -> None:
    changes = (
        {"state_size": 8}
        if family == "Mamba"
        else {"n_layer": 2, "n_head": 4}
        if family == "Bloom"
        else {}
    )
    model = tiny.model(family, **changes)
    data = tiny.examples([5, 20, 9])
    # Doge's eager attention is another function than its default in transformers 5.17.
    has_twin = family not in ("Mamba", "Doge")
    twin = float64_twin(model) if has_twin else copy.deepcopy(model).double()
    reference = tiny.naive_loss(twin, data)
    reference.backward()
    loss = PackLoss(model)
    notes = check_paths(loss, probe_pack(data), torch.float32)
    if family != "Falcon":  # from transformers 5.24 on it keeps segments apart
        assert len(notes) == 1
    assert all("in right-padded batches" in note for note in notes)
    value = step_gradient(loss, data, [(0, 1), (2,)])
    assert value == pytest.approx(float(reference), rel=1e-6)
    assert tiny.gradient_difference(model, twin) <= 2e-6


def test_a_head_that_is_not_a_matrix_goes_through_the_models_own_forward() -> None:
    model = tiny.model()

    def larger(_module: torch.nn.Module, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        return out * 1.5

    tiny.head(model).register_forward_hook(larger)
    data = tiny.examples([12, 30])
    loss = PackLoss(model)
    notes = check_paths(loss, probe_pack(data), torch.float32)
    assert len(notes) == 1
    assert "not a plain matrix" in notes[0]
    assert step_gradient(loss, data, [(0, 1)]) == pytest.approx(
        float(tiny.naive_loss(float64_twin(model), data)), rel=1e-6
    )


def test_a_fused_loss_that_is_not_the_models_own_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that is a little wrong in the model's own precision would train a little wrong, in
    silence.
    """

    def wrong(hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, correct = fused_cross_entropy_sum(hidden, *rest)
        return total * (1.01 if hidden.dtype == torch.float32 else 1.0), correct

    monkeypatch.setattr("sftx.model.pack_loss.fused_cross_entropy_sum", wrong)
    with pytest.raises(UserError, match=r"the trainer's loss .* is not the model's own"):
        check_paths(PackLoss(tiny.model()), probe_pack(tiny.examples([12, 30])), torch.float32)


def test_the_first_id_without_an_embedding_is_refused() -> None:
    loss = PackLoss(tiny.model(vocab_size=264))
    check_sizes(loss, 64, 263)
    with pytest.raises(
        UserError, match=r"token id 264 is outside the vocabulary of the model \(264 embeddings\)"
    ):
        check_sizes(loss, 64, 264)


def test_perturbing_a_segment_leaves_the_others_alone() -> None:
    loss = PackLoss(tiny.model()).eval()
    data = tiny.examples([11, 17, 23])
    other = [tiny.examples([11], seed=9)[0], *data[1:]]
    logits = []
    for chosen in (data, other):
        pack = to_tensors(build_pack(chosen), CPU)
        logits.append(loss.own_logits(replace(pack, index=torch.arange(51))))
    assert torch.equal(logits[0][11:], logits[1][11:])
    assert not torch.equal(logits[0][:11], logits[1][:11])


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 4.0)])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_fused_cross_entropy_is_the_naive_one(
    transform: LogitTransform, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftx.model.loss.CHUNK_BYTES", chunk * 4 * 50)
    torch.manual_seed(0)
    hidden, head, bias = (
        torch.randn(*shape, requires_grad=True) for shape in ((11, 8), (50, 8), (50,))
    )
    label, weight = torch.randint(0, 50, (11,)), torch.rand(11)
    fused, _ = fused_cross_entropy_sum(hidden, head, bias, label, weight, transform)
    fused_gradients = torch.autograd.grad(fused * 0.3, (hidden, head, bias))
    twins = [x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    logits = transform(twins[0] @ twins[1].t() + twins[2])
    nll = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    naive = (nll * weight.double()).sum()
    assert float(fused) == pytest.approx(float(naive), rel=1e-6)
    for ours, theirs in zip(fused_gradients, torch.autograd.grad(naive * 0.3, twins), strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) <= 1e-6
    assert float(cross_entropy_sum(logits.float(), label, weight)) == pytest.approx(
        float(naive), rel=1e-6
    )


def test_chunks_of_rows_add_up_in_half_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the head is summed over chunks in float32, whatever the products are computed
    in.
    """
    torch.manual_seed(0)
    hidden, head = (torch.randn(*shape, requires_grad=True) for shape in ((12, 8), (50, 8)))
    label, weight = torch.randint(0, 50, (12,)), torch.rand(12)
    gradients = []
    for rows in (1000, 3):
        monkeypatch.setattr("sftx.model.loss.CHUNK_BYTES", rows * 4 * 50)
        with torch.autocast("cpu", torch.bfloat16):
            total, _ = fused_cross_entropy_sum(hidden, head, None, label, weight, LogitTransform())
        gradients.append(torch.autograd.grad(total, (hidden, head)))
    for whole, chunked in zip(*gradients, strict=True):
        assert float((whole - chunked).norm() / whole.norm()) < 0.01


def test_small_weights_are_not_lost_beside_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are summed in float64: in float32 each of these rows would vanish beside the
    first.
    """
    monkeypatch.setattr("sftx.model.loss.CHUNK_BYTES", 4 * 50)  # one row at a time
    hidden, head = torch.zeros(201, 8), torch.zeros(50, 8)  # every loss is log 50
    label = torch.zeros(201, dtype=torch.int64)
    weight = torch.ones(201)
    weight[0] = 2.0**25
    fused, _ = fused_cross_entropy_sum(hidden, head, None, label, weight, LogitTransform())
    plain = cross_entropy_sum(torch.zeros(201, 50), label, weight)
    expected = (2**25 + 200) * math.log(50)
    assert float(fused) == pytest.approx(expected, rel=1e-7)
    assert float(plain) == pytest.approx(expected, rel=1e-7)


def test_the_row_of_a_padding_token_does_not_train() -> None:
    """As in `torch.nn.Embedding`, which gives it no gradient where the head does not share the
    weight.
    """
    model, data = (
        tiny.model("Qwen2", pad_token_id=5, tie_word_embeddings=False),
        tiny.examples(LENGTHS),
    )
    data[0].ids[:2] = 5
    twin = float64_twin(model)
    tiny.naive_loss(twin, data).backward()
    step_gradient(PackLoss(model), data, [(0, 1, 2), (3, 4, 5, 6)])
    assert float(model.model.embed_tokens.weight.grad[5].abs().max()) == 0.0
    assert tiny.gradient_difference(model, twin) <= 1e-6


def test_bad_step_changes_no_weight() -> None:
    model = tiny.model()
    loss = PackLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    data = tiny.examples([12])
    pack = to_tensors(build_pack(data), CPU)
    before = copy.deepcopy(model.state_dict())
    poisoned = replace(pack, weight=pack.weight * float("nan"))
    result = train_step(loss, optimizer, [poisoned], 1.0, 1e-2, 1.0, nullcontext)
    assert float(result.bad) == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    result = train_step(
        loss, optimizer, [pack], float(data[0].weights.sum()), 1e-2, 1.0, nullcontext
    )
    assert float(result.bad) == 0
    assert not torch.equal(before["lm_head.weight"], model.state_dict()["lm_head.weight"])


def test_a_pack_of_nothing_has_a_gradient_of_zero_for_every_weight() -> None:
    """Ranks that have no pack take part in the exchange of every gradient."""
    for tied in (True, False):
        model = tiny.model(tie_word_embeddings=tied)
        loss = PackLoss(model)
        torch.full((264, 32), float("nan"))  # what uninitialised memory would hold
        total = loss(to_tensors(build_pack(()), torch.device("cpu")))
        total.backward()
        assert float(total) == 0.0
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) == 0.0, name


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, pack = PackLoss(tiny.model()), to_tensors(build_pack(tiny.examples(LENGTHS)), CPU)
    added = Mock(wraps=_add_outer)
    monkeypatch.setattr("sftx.model.loss._add_outer", added)
    with torch.no_grad():
        value = loss(pack)
    assert not added.called
    assert torch.equal(value, loss(pack).detach())
    assert added.called


def test_rotary_embeddings_that_go_by_the_longest_segment_are_found() -> None:
    """Phi-3's: beyond a length other frequencies hold, and transformers takes them for all that is
    in a pack.
    """
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "rope_theta": 1e4,
    }
    rope["original_max_position_embeddings"] = 32
    model = tiny.model(
        "Phi3", rope_parameters=rope, original_max_position_embeddings=32, pad_token_id=0
    )
    for layer in model.model.layers:
        layer.self_attn.qkv_proj.weight.data *= 20  # attention that is far from uniform
    data = tiny.examples([20, 60, 9])
    reference = float(tiny.naive_loss(float64_twin(model), data))
    loss = PackLoss(model)
    assert check_paths(loss, probe_pack(data), torch.float32, longest=32) == []
    assert step_gradient(loss, data, [(0, 1, 2)]) != pytest.approx(reference, rel=1e-4)
    (said,) = check_paths(loss, probe_pack(data), torch.float32, longest=60)
    assert "cannot keep packed segments apart" in said
    assert step_gradient(loss, data, [(0, 1, 2)]) == pytest.approx(reference, rel=1e-6)
