"""Models whose forward depends on length: each example alone in float64 through the plain model is
the oracle.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from sftx.data.pack import build_pack, probe_pack
from sftx.model.checks.probe import reach, segment_lengths
from sftx.model.checks.start import check_paths
from sftx.model.pack_loss import PackLoss, to_tensors

CPU = torch.device("cpu")
LENGTHS = [120, 9, 97, 43, 110, 5]
"""Beyond the 40 tokens at which the models below change what they do."""
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
DEEPSEEK: dict[str, Any] = {
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "hc_mult": 2,
    "num_key_value_heads": 1,
    "sliding_window": 200,
    "mlp_layer_types": ["moe", "moe"],
    "layer_types": ["sliding_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 40},
}
ROUNDING = {"Phimoe": 3e-3}
"""How far fp32 alone moves the gradients of a family; of the others less than 5e-6."""
BY_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "attention in chunks": (
        "Llama4Text",
        {
            "head_dim": 8,
            "attention_chunk_size": 40,
            "num_local_experts": 4,
            "intermediate_size_mlp": 64,
        },
    ),
    "temperature by position": (
        "Llama4Text",
        {
            "head_dim": 8,
            "attention_chunk_size": 256,
            "floor_scale": 40,
            "num_local_experts": 4,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 64,
        },
    ),
    "a window that the attention is not told": (
        "Qwen2Moe",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2, **EXPERTS},
    ),
    "a window in the mask alone": ("Phimoe", {"sliding_window": 40, "num_local_experts": 4}),
    "compressed keys": ("DeepseekV4", DEEPSEEK),
    "dynamic rotary embeddings": (
        "Llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 40},
    ),
}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", {"sliding_window": 8}),
    "Gemma3": (
        "Gemma3Text",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "chunks that no example reaches": (
        "Llama4Text",
        {
            "head_dim": 8,
            "attention_chunk_size": 150,
            "num_local_experts": 4,
            "intermediate_size_mlp": 64,
        },
    ),
}


def sharpened(family: str, changes: dict[str, Any]) -> Any:
    """A tiny model whose attention is far from uniform, so that it matters which keys are seen."""
    model = tiny.model(family, **changes)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def alone_in_float64(model: Any, data: list[Any]) -> tuple[float, torch.nn.Module]:
    """Loss of `data`, each example alone through a fresh float64 model, and a model that holds the
    gradients.
    """
    total, weight = 0.0, sum(float(example.weights[1:].astype(float).sum()) for example in data)
    kept = copy.deepcopy(model).double()
    for p in kept.parameters():
        p.grad = torch.zeros_like(p)
    for example in data:
        twin = copy.deepcopy(model).double()
        if hasattr(twin, "set_experts_implementation"):
            twin.set_experts_implementation("eager")
        ids = torch.tensor(example.ids.astype("int64"))[None]
        logits = twin(input_ids=ids, use_cache=False).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        value = (losses * torch.tensor(example.weights[1:].astype("float64"))).sum() / weight
        value.backward()
        total += float(value.detach())
        for ours, theirs in zip(kept.parameters(), twin.parameters(), strict=True):
            if theirs.grad is not None:
                ours.grad += theirs.grad
    return total, kept


def trained(loss: PackLoss, data: list[Any], order: list[int]) -> float:
    """One step in one pack, its gradients left in `.grad`."""
    loss.zero_grad()
    weight = sum(float(example.weights[1:].astype(float).sum()) for example in data)
    value = loss(to_tensors(build_pack([data[i] for i in order]), CPU)) / weight
    value.backward()
    return float(value.detach())


ALONE = {"dynamic rotary embeddings"}
"""What goes by the longest row of a batch; of the rest the rows may be padded."""


@pytest.mark.parametrize("what", BY_LENGTH)
def test_what_depends_on_length_is_not_packed_and_is_exact(what: str) -> None:
    family, changes = BY_LENGTH[what]
    model = sharpened(family, changes)
    data = tiny.examples(LENGTHS)
    value, kept = alone_in_float64(model, data)
    loss = PackLoss(model)
    said, *_ = check_paths(loss, probe_pack(data), torch.float32, longest=120, largest_pack=2048)
    assert ("one at a time" if what in ALONE else "in right-padded batches") in said
    close = 1e-5 if family in ROUNDING else 3e-6
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 4, 0, 3, 1]):
        assert trained(loss, data, order) == pytest.approx(value, rel=close)
        assert tiny.gradient_difference(model, kept) <= ROUNDING.get(family, 5e-6)


@pytest.mark.parametrize("what", PACKED)
def test_what_is_exact_when_packed_stays_packed(what: str) -> None:
    family, changes = PACKED[what]
    model = sharpened(family, changes)
    data = tiny.examples(LENGTHS)
    value, kept = alone_in_float64(model, data)
    loss = PackLoss(model)
    said = check_paths(loss, probe_pack(data), torch.float32, longest=120, largest_pack=2048)
    assert loss.paths.isolate, said
    assert trained(loss, data, [0, 1, 2, 3, 4, 5]) == pytest.approx(value, rel=3e-6)
    assert tiny.gradient_difference(model, kept) <= 5e-6


def test_what_goes_by_the_place_in_the_pack_is_found_where_packs_reach_it() -> None:
    """Llama 4's temperature counts tokens of the whole pack: no example needs to be long for it."""
    changes = {"head_dim": 8, "floor_scale": 100, "num_hidden_layers": 4, "num_local_experts": 4}
    loss = PackLoss(sharpened("Llama4Text", {**changes, "intermediate_size_mlp": 64}))
    data = tiny.examples([20, 20, 20])
    check_paths(loss, probe_pack(data), torch.float32, longest=20, largest_pack=90)
    assert loss.paths.isolate
    check_paths(loss, probe_pack(data), torch.float32, longest=20, largest_pack=300)
    assert not loss.paths.isolate


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_rounding_in_bf16_is_not_taken_for_a_leak(family: str) -> None:
    """Routers choose otherwise where the last bit differs, and all that follows with them."""
    changes = {
        "num_experts": 64,
        "num_local_experts": 64,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    }
    model = sharpened(family, {**changes, "head_dim": 16, "num_hidden_layers": 12})
    for p in model.parameters():
        if p.ndim == 3:  # the experts
            torch.nn.init.normal_(p, std=0.5)
    loss = PackLoss(model)
    data = tiny.examples([60, 60, 60])
    assert check_paths(loss, probe_pack(data), torch.bfloat16, longest=60) == []
    assert loss.paths.isolate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_in_the_model_itself_is_found_in_any_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in is of the class; only the model's own probe tells what was done to it."""
    model = sharpened("Llama", {})
    model.model.layers[0].mlp.register_forward_hook(
        lambda _m, _a, out: out + out.cumsum(1).roll(1, 1)
    )
    loss = PackLoss(model)
    (said,) = check_paths(loss, probe_pack(tiny.examples([60, 60, 60])), dtype, longest=60)
    assert "one at a time" in said


class MixesGradients(torch.autograd.Function):
    """Leaves values alone; every row's gradient also goes to the rows before it, whatever their
    segment.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.flip(1).cumsum(1).flip(1)


def test_a_leak_of_gradients_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and loss are right to the last bit."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: MixesGradients.apply(forward(self, x)))
    loss = PackLoss(sharpened("Llama", {}))
    (said,) = check_paths(loss, probe_pack(tiny.examples([60, 60, 60])), torch.float32, longest=60)
    assert "in right-padded batches" in said  # where a row holds one segment
    assert loss.paths.padded
    assert not loss.paths.isolate


def test_the_probe_is_longer_than_every_length_that_is_named() -> None:
    """By whatever name, in whatever section; widths, ids of tokens and switches do not count."""
    settings = {
        "hidden_size": 900,
        "eos_token_id": 800,
        "use_cache": True,
        "text_config": {"some_new_window": 500, "kinds": [{"block": 16, "blocks_kept": 20}]},
        "rope_parameters": {"original_max_position_embeddings": 1024.0, "factor": 1.5},
    }
    assert reach(settings, 400) == 320  # 16 x 20
    assert reach(settings, 1000) == 500
    assert reach(settings, 4000) == 1024
    assert reach({"hidden_size": 900}, 4000) == 0
    for longest in (10, 400, 1000, 4000):
        lengths = segment_lengths(settings, longest)
        assert max(lengths) <= longest
        assert sum(length > min(reach(settings, longest), longest - 4) for length in lengths) >= 2
