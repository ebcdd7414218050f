"""Models that cannot keep packed segments apart: as the rows of a right-padded batch each example
is what it is alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_isolation import LENGTHS, alone_in_float64, sharpened, trained
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mamba import modeling_mamba

import sftx
from sftx import cli
from sftx.data.pack import PADDING, batch_tokens, build_pack, like_lengths, probe_pack
from sftx.data.plan import Plan
from sftx.model import fallbacks
from sftx.model.checks.isolation import measure_isolation
from sftx.model.checks.start import check_paths
from sftx.model.fallbacks import causal_conv, own_fallbacks, without_kernels
from sftx.model.pack_loss import PackLoss, Paths, to_tensors
from sftx.model.padded import as_batch
from sftx.model.scan import selective_scan
from sftx.settings.schema import Batch

CPU = torch.device("cpu")
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
    "num_hidden_layers": 4,
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5": ("Qwen3_5Text", DELTA),
    "Mamba": ("Mamba", {"state_size": 8}),
    "BLOOM": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "Qwen3-Next": (
        "Qwen3Next",
        {**DELTA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48},
    ),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Falcon-H1": ("FalconH1", {**SSM, "mamba_d_ssm": 64, "mamba_chunk_size": 32}),
    "Nemotron-H": (
        "NemotronH",
        {
            "hybrid_override_pattern": "M*M-",
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 32,
        },
    ),
    "Granite hybrid": (
        "GraniteMoeHybrid",
        {
            **SSM,
            "layer_types": ["mamba", "attention"],
            "mamba_chunk_size": 32,
            "mamba_expand": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
        },
    ),
    "Jamba": (
        "Jamba",
        {**JAMBA, **EXPERTS, "num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "Mamba-2": (
        "Mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1, "chunk_size": 32},
    ),
    "Kimi Linear": (
        "KimiLinear",
        {
            **LATENT,
            "pad_token_id": 0,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "linear_attn_config": {
                "kda_layers": [1, 2, 3],
                "full_attn_layers": [4],
                "num_heads": 4,
                "head_dim": 8,
                "short_conv_kernel_size": 4,
            },
        },
    ),
    "MPT": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "Falcon": ("Falcon", {"alibi": True}),
}
QUICK = {"Qwen3.5", "Mamba", "BLOOM"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES],
)
def test_rows_of_a_batch_are_what_each_is_alone(name: str) -> None:
    family, changes = FAMILIES[name]
    model = sharpened(family, changes)
    data = tiny.examples(LENGTHS)
    with own_fallbacks():
        value, kept = alone_in_float64(model, data)
    loss = PackLoss(model)
    (said,) = check_paths(loss, probe_pack(data), torch.float32, longest=120, largest_pack=512)
    assert "side by side in right-padded batches" in said
    assert loss.paths.transform is not None  # only targets meet the head
    found = loss.paths
    loss.take(Paths(isolate=False))
    trained(loss, data, [0, 1, 2, 3, 4, 5])
    rounding = tiny.gradient_difference(model, kept)  # nothing can leak between them here
    loss.take(found)
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 4, 0, 3, 1]):
        assert trained(loss, data, order) == pytest.approx(value, rel=3e-6)
        assert tiny.gradient_difference(model, kept) <= 3 * rounding + 1e-6


@pytest.mark.parametrize(("across_rows", "way"), [(False, "padded"), (True, "alone")])
def test_what_looks_across_rows_runs_alone(
    across_rows: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaMLP.forward

    def looks_back(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        seen = forward(self, x).cumsum(1)  # of the whole stream, whatever segments it holds
        return seen + seen.mean(0, keepdim=True) if across_rows else seen

    monkeypatch.setattr(LlamaMLP, "forward", looks_back)
    loss = PackLoss(sharpened("Llama", {}))
    check_paths(loss, probe_pack(tiny.examples([60, 60, 60])), torch.float32, longest=60)
    assert not loss.paths.isolate
    assert loss.paths.padded == (way == "padded")


def use_kernel(monkeypatch: pytest.MonkeyPatch, keeps_apart: bool) -> None:
    """Let LFM2's convolution be computed by a kernel that takes float32 alone, as one that
    transformers has found; where it `keeps_apart`, no tap reaches into another segment.
    """

    def kernel(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("this kernel takes float32 alone")
        assert bias is None
        assert activation is None
        taps = weight.shape[-1]
        out = torch.zeros_like(x)
        for back in range(taps):
            seen = x.roll(back, -1)
            seen[..., :back] = 0
            if seq_idx is not None and keeps_apart:
                seen = seen * (seq_idx.roll(back, -1) == seq_idx)[:, None]
            out = out + seen * weight[:, taps - 1 - back, None]
        return out

    package = ModuleType("some_kernels")
    package.causal_conv1d_fn = kernel  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "some_kernels", package)
    with own_fallbacks():
        wrapper: Any = modeling_lfm2.causal_conv1d_fn
    plain = wrapper.__wrapped__
    wrapped = use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "some_kernels")(plain)
    name = (modeling_lfm2.__name__, "causal_conv1d_fn")
    monkeypatch.delitem(fallbacks._replaced, name, raising=False)
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", wrapped)


@pytest.mark.parametrize("keeps_apart", [True, False])
def test_kernels_that_keep_segments_apart_pack(
    keeps_apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernel(monkeypatch, keeps_apart)
    kernel = modeling_lfm2.causal_conv1d_fn
    model = sharpened(*FAMILIES["LFM2"])
    data = tiny.examples([60, 9, 47])
    with without_kernels(model):
        assert modeling_lfm2.causal_conv1d_fn is not kernel
        value, kept = alone_in_float64(model, data)
    assert modeling_lfm2.causal_conv1d_fn is kernel
    loss = PackLoss(model)
    check_paths(loss, probe_pack(data), torch.float32, longest=60, largest_pack=128)
    assert loss.paths.isolate == keeps_apart
    assert loss.paths.padded != keeps_apart
    assert trained(loss, data, [0, 1, 2]) == pytest.approx(value, rel=3e-6)
    assert tiny.gradient_difference(model, kept) < 1e-5


@pytest.mark.slow
def test_what_recurrent_layers_round_is_not_taken_for_a_leak() -> None:
    """They compute in float32: in this shape a gradient is 2e-5 off, one segment at a time."""
    config = Qwen3_5TextConfig(
        vocab_size=50304,
        hidden_size=384,
        intermediate_size=1280,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=8,
        linear_num_value_heads=8,
        linear_key_head_dim=48,
        linear_value_head_dim=48,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = measure_isolation(model, 341, 1024)
    assert found.pads
    assert not found.packs


def test_where_the_tokens_of_a_pack_stand() -> None:
    batch = as_batch(torch.tensor([0, 2, 5, 6], dtype=torch.int32), CPU)
    assert batch.rows.tolist() == [[0, 1, 1], [2, 3, 4], [5, 5, 5]]
    assert batch.places.tolist() == [0, 1, 3, 4, 5, 6]
    tokens = torch.arange(6)
    assert batch.flat(tokens[batch.rows][..., None])[:, 0].tolist() == tokens.tolist()


@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(1, 120), st.integers(1, 5)
)
def test_batches_hold_every_example_once_and_little_padding(
    lengths: list[int], capacity: int, world_size: int
) -> None:
    ranks = like_lengths(lengths, capacity, world_size)
    assert sorted(i for bins in ranks for members in bins for i in members) == list(
        range(len(lengths))
    )
    assert len({len(bins) for bins in ranks}) == 1
    total = 0
    for members in (members for bins in ranks for members in bins):
        tokens = batch_tokens(np.array(lengths), members)
        assert len(members) <= 1 or tokens <= capacity
        total += tokens
    assert sum(lengths) >= (1 - PADDING) * total


def test_like_lengths_meet_and_ranks_get_equal_shares() -> None:
    assert like_lengths([10, 3, 9, 3, 10, 3], 30) == [[(0, 2, 4), (1, 3, 5)]]
    assert like_lengths([10, 10, 10], 30, 2) == [[(1, 2)], [(0,)]]
    assert like_lengths([10], 30, 2) == [[(0,)], [()]]


@pytest.mark.parametrize(("lengths", "padding"), [([10, 7, 5], 0), ([10, 9], 1 / 20)])
def test_the_plan_knows_its_padding(lengths: list[int], padding: float) -> None:
    weights = np.ones(len(lengths))
    plan = Plan(np.array(lengths, np.int32), weights, Batch(examples_per_step=len(lengths)), 0)
    assert plan.padding(30) == pytest.approx(padding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_linear_scan_is_transformers_own(dtype: torch.dtype) -> None:
    n, inner, tokens, states = 2, 24, 37, 8
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    inputs = {
        "hidden_states": random(n, inner, tokens),
        "dt": random(n, inner, tokens),
        "A": (-random(inner, states).detach().abs()).requires_grad_(),
        "B": random(n, states, tokens),
        "C": random(n, states, tokens),
        "D": random(inner),
        "z": random(n, inner, tokens),
        "delta_bias": random(inner),
    }
    weight = random(n, inner, tokens).detach()
    found: list[tuple[torch.Tensor, ...]] = []
    with own_fallbacks():
        own = modeling_mamba.mamba_selective_scan
    for scan in (own, selective_scan):
        out, last = scan(**inputs, delta_softplus=True, return_last_state=True)
        found.append((out, last, *torch.autograd.grad((out * weight).sum(), [*inputs.values()])))
    for theirs, ours in zip(*found, strict=True):
        assert float((theirs - ours).detach().norm() / theirs.detach().norm()) < 1e-6


@pytest.mark.parametrize(("bias", "activation"), [(True, "silu"), (False, None)])
def test_the_causal_convolution_is_transformers_own(bias: bool, activation: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 11), (6, 4), (6,)] if bias else [(2, 6, 11), (6, 4)]
    inputs: list[Any] = [
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    with own_fallbacks():
        own = modeling_mamba.causal_conv1d_fn
    found: list[tuple[torch.Tensor, ...]] = []
    for convolution in (own, causal_conv):
        out = convolution(*inputs, activation=activation)
        found.append((out, *torch.autograd.grad((out * out).sum(), inputs)))
    for theirs, ours in zip(*found, strict=True):
        assert float((theirs - ours).detach().abs().max()) < 1e-12
    with pytest.raises(ValueError, match="cannot keep packed segments apart"):
        causal_conv(*inputs, seq_idx=torch.zeros(1))


def test_the_scan_is_ours_where_a_model_trains_and_theirs_where_it_is_measured() -> None:
    PackLoss(tiny.model("Mamba", state_size=8))
    assert modeling_mamba.mamba_selective_scan is selective_scan
    with own_fallbacks():
        assert modeling_mamba.mamba_selective_scan is not selective_scan
    assert modeling_mamba.mamba_selective_scan is selective_scan


def test_a_run_says_that_it_pads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny.folder(tmp_path / "model", family="Bloom", n_layer=2, n_head=4)
    rows = [[f"What is {i}?", "A number. " * (1 + i % 3)] for i in range(24)]
    settings: dict[str, Any] = {
        "model": {"path": model},
        "output": "out",
        "data": {"rows": rows, "eval_split": 0.25, "cache": "cache"},
        "batch": {"steps": 2},
        "runtime": {"progress": False, "device": "cpu", "tokens_per_pack": 200},
    }
    result = sftx.train(**settings)
    assert result.eval_after is not None
    told = json.loads(Path("out/run.json").read_text())
    assert told["padded"]
    (said,) = [note for note in told["notes"] if note.startswith("padded in batches")]
    assert said.endswith(" % padding")
    assert float(said.split()[-3]) < 100 * PADDING
    Path("run.yaml").write_text(json.dumps(settings))
    capsys.readouterr()
    assert cli.main(["plan", "run.yaml"]) == 0
    assert f"200 tokens at most, {said}; 0 of 2 layers" in capsys.readouterr().out
    assert cli.main(["inspect", "run.yaml", "step=1"]) == 0
    shown = capsys.readouterr().out.split("\n")
    assert shown[0] == f"packs run {said.replace('padded', 'padded,')}"
    packs = {line.partition(":")[0] for line in shown if line.startswith("── step 1, pack")}
    first = Path("out/metrics.jsonl").read_text().split("\n")[1]  # behind step 0
    assert len(packs) == json.loads(first)["packs"] > 1


def test_padding_takes_no_part_in_the_loss() -> None:
    """Whatever stands behind a row's end."""
    model = tiny.model("Bloom", n_layer=2, n_head=4)
    loss = PackLoss(model)
    loss.take(Paths(isolate=False, padded=True))
    pack = to_tensors(build_pack(tiny.examples([5, 20, 9])), CPU)
    alone = PackLoss(model)
    alone.take(Paths(isolate=False))
    assert float(loss(pack).detach()) == pytest.approx(float(alone(pack).detach()), rel=1e-6)
    assert loss.hidden(pack).shape == (34, 32)


def test_a_model_whose_decoder_cannot_be_called_alone_trains(tmp_path: Path) -> None:
    """Llama 4's text model gives no hidden states, so that its speed cannot be told beforehand."""
    chunks: dict[str, Any] = {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 64}
    model = tiny.folder(tmp_path / "m", family="Llama4Text", attention_chunk_size=40, **chunks)
    rows = [[f"{i}: ", "abcdefghij" * 12] for i in range(4)]
    result = sftx.train(
        model=model,
        data={"rows": rows, "workers": 0, "cache": str(tmp_path / "cache")},
        output=str(tmp_path / "run"),
        batch={"steps": 1},
        runtime={"device": "cpu", "threads": 1, "progress": False},
    )
    facts = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
    assert facts["padded"]
    assert facts["status"] == "finished"
