"""Adapters on mixtures of experts and on layers that share weights: what is adapted, what is
refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from sftx.data.pack import blank_pack
from sftx.model.adapter import attach, trainable
from sftx.model.memory import MemoryEstimator
from sftx.model.mixture import describe_adapter
from sftx.model.pack_loss import PackLoss, Paths, to_tensors
from sftx.model.runtime import Machine
from sftx.settings.schema import Adapter
from sftx.types import UserError

MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    },
    "Mixtral": {"num_local_experts": 4},
    "Phimoe": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
ZAMBA2: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "num_mem_blocks": 1,
    "mamba_d_state": 8,
    "mamba_headdim": 16,
    "n_mamba_heads": 4,
    "chunk_size": 8,
    "use_mamba_kernels": False,
}


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_are_left_alone_and_what_is_adapted_is_said(family: str) -> None:
    model = tiny.model(family, **MIXTURES[family])
    attach(model, Adapter(method="lora", rank=4), 0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert not [
        name for name in names if {"gate", "router", "shared_expert_gate"} & {*name.split(".")}
    ]
    said = describe_adapter(model)
    assert "q_proj x 2 (512)" in said  # two layers, (32 x 4 + 4 x 32) each
    assert "routers are left alone" in said
    assert (
        ("mlp.experts x 2" in said)
        == ("every expert" in said)
        == (family in ("Qwen3Moe", "Mixtral"))
    )
    sizes = [
        int(part.split(")")[0].replace(",", ""))
        for part in said.split(" (")[2:]
        if part[0].isdigit()
    ]
    assert sum(sizes) == trainable(model)[0]


def test_a_router_that_is_named_is_adapted() -> None:
    model = tiny.model("Phimoe", **MIXTURES["Phimoe"])
    attach(model, Adapter(method="lora", rank=4, targets=["q_proj", "router"]), 0)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "router" in name]
    assert "routers are left alone" not in describe_adapter(model)


def test_dora_on_experts_is_refused_in_words_of_our_own() -> None:
    model = tiny.model("Mixtral", **MIXTURES["Mixtral"])
    with pytest.raises(
        UserError, match=r"adapter\.method: dora cannot adapt the experts of MixtralForCausalLM"
    ):
        attach(model, Adapter(method="dora", rank=4), 0)


def test_a_merge_into_weights_that_layers_share_is_refused_before_training() -> None:
    with pytest.raises(
        UserError,
        match=r"adapter\.merge: Zamba2ForCausalLM uses the weight of .* in several places",
    ):
        attach(tiny.model("Zamba2", **ZAMBA2), Adapter(method="lora", rank=4, merge=True), 0)
    attach(tiny.model("Zamba2", **ZAMBA2), Adapter(method="lora", rank=4), 0)
    for targets in (["q_proj", "lm_head"], ["embed_tokens"]):
        tied = Adapter(method="lora", targets=targets, merge=True)
        with pytest.raises(UserError, match=r"uses the weight of .*(lm_head|embed_tokens) in sev"):
            attach(tiny.model(tie_word_embeddings=True), tied, 0)
        attach(tiny.model(tie_word_embeddings=False), tied, 0)
    attach(tiny.model(tie_word_embeddings=True), Adapter(method="lora", merge=True), 0)


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="without data, torch 2.11 multiplies groups of matrices in bfloat16 only",
)
@pytest.mark.parametrize("alone", [False, True])
def test_the_memory_of_experts_is_predicted_without_a_word(
    alone: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    loss = PackLoss(tiny.model("Mixtral", **MIXTURES["Mixtral"])).train()
    if alone:
        loss.take(Paths(isolate=False))
    predicted = MemoryEstimator(loss, Machine(torch.device("cpu"), torch.float32), base=0).predict(
        blank_pack(64, 32, 0.5)
    )
    assert predicted.gradients == 4 * trainable(loss)[0]
    assert "".join(capfd.readouterr()) == ""


def test_sizes_that_depend_on_data_are_named_once(capfd: pytest.CaptureFixture[str]) -> None:
    loss = PackLoss(tiny.model()).train()
    loss.model.model.layers[0].mlp.register_forward_hook(
        lambda _m, _a, out: out + out[out > 0].sum()
    )
    machine = Machine(torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="sizes inside LlamaForCausalLM depend on the data"):
        MemoryEstimator(loss, machine, base=0).predict(blank_pack(64, 32, 0.5))
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_autocast_reaches_the_experts(family: str) -> None:
    """Under autocast experts multiply in bf16, as every other product does, and their weights get
    the gradients that one product after the other gives them.
    """
    found = []
    for way in ("grouped_mm", "eager"):
        model = tiny.model(family, **MIXTURES[family])
        model.set_experts_implementation(way)
        loss, pack = PackLoss(model).train(), blank_pack(40, 20, 1.0)
        dtypes = set()
        own = torch.nn.functional.grouped_mm

        def watched(*args: Any, own: Any = own, dtypes: Any = dtypes, **more: Any) -> torch.Tensor:
            out = own(*args, **more)
            dtypes.add(out.dtype)
            return out

        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            patch.setattr(torch.nn.functional, "grouped_mm", watched)
            value = loss(to_tensors(pack, torch.device("cpu")))
        value.backward()
        assert dtypes == ({torch.bfloat16} if way == "grouped_mm" else set())
        gradients = [p.grad for name, p in model.named_parameters() if "experts" in name]
        found.append([grad for grad in gradients if grad is not None])
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.02
