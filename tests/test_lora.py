"""Adapter and layer in one function: the numbers of peft's own forward, and peft's own forward
wherever it must be.
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import test_loss
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch.utils.checkpoint import checkpoint

from sftx.data.pack import probe_pack
from sftx.model import lora
from sftx.model.adapter import attach, cast_frozen_weights
from sftx.model.checks.start import check_paths
from sftx.model.load import load_model
from sftx.model.lora import LoraLinear, fuse
from sftx.model.pack_loss import PackLoss
from sftx.settings.schema import Adapter, Model


def adapted(family: str = "Qwen2", **changes: Any) -> PeftModel:
    """A tiny model with an adapter whose second matrix is no longer zero."""
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **changes
    )
    model = get_peft_model(tiny.model(family), config).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(
    model: torch.nn.Module, autocast: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss on fixed tokens, and the gradient of every adapter weight."""
    ids = torch.arange(3, 51).reshape(2, 24)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative L2 difference over all gradients."""
    assert ours.keys() == theirs.keys()
    squares = [((ours[n].double() - theirs[n].double()) ** 2).sum() for n in ours]
    return float((sum(squares) / sum((theirs[n].double() ** 2).sum() for n in ours)) ** 0.5)


@pytest.mark.parametrize("family", ["Qwen2", "Phi"])  # both have biases beneath
def test_gradients_are_those_of_peft(family: str) -> None:
    model = adapted(family)
    loss, theirs = gradients(model)
    rough_loss, rough = gradients(model, autocast=True)
    assert fuse(model) == sum(type(m) is LoraLinear for m in model.modules()) > 0
    fused_loss, ours = gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert difference(ours, theirs) <= 1e-6
    # In bf16 both are as far from fp32, and each other's dtypes.
    fused_rough_loss, fused_rough = gradients(model, autocast=True)
    assert fused_rough_loss == pytest.approx(rough_loss, rel=2e-3)
    assert difference(fused_rough, theirs) <= 1.1 * difference(rough, theirs)
    assert {n: g.dtype for n, g in fused_rough.items()} == {n: g.dtype for n, g in rough.items()}


def test_frozen_matrices_in_the_precision_of_autocast_change_no_number() -> None:
    model = adapted("Qwen2")
    fuse(model)
    loss, theirs = gradients(model, autocast=True)
    outside = {n: p.dtype for n, p in model.named_parameters() if "base_layer" not in n}
    cast_frozen_weights(model, torch.bfloat16)
    assert gradients(model, autocast=True)[0] == loss
    assert difference(gradients(model, autocast=True)[1], theirs) == 0
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert {dtype for n, dtype in dtypes.items() if "layers" in n and "base_layer" in n} == {
        torch.bfloat16
    }
    assert outside.items() <= dtypes.items()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_of_weights_is_let_go_once_its_matrices_are_held_otherwise(tmp_path: Path) -> None:
    model = load_model(Model(path=tiny.folder(tmp_path / "model")), torch.device("cpu"))
    attach(model, Adapter(method="lora", dropout=0.0), 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mapped = [str(tmp_path / "model" / "model.safetensors") in Path("/proc/self/maps").read_text()]
    cast_frozen_weights(model, torch.bfloat16)
    mapped.append(
        str(tmp_path / "model" / "model.safetensors") in Path("/proc/self/maps").read_text()
    )
    assert mapped == [True, False]
    assert all(torch.equal(p, before[n].to(p.dtype)) for n, p in model.named_parameters())
    assert tiny.embeddings(model).weight is tiny.head(model).weight


@pytest.mark.parametrize("family", test_loss.FAMILIES)
def test_a_packed_adapter_has_the_naive_gradients(family: str) -> None:
    """Against float64 and peft's own forward, one example at a time."""
    model = tiny.model(family, **test_loss.FAMILIES[family])
    with patch.object(lora, "fuse"):
        attach(model, Adapter(method="lora", dropout=0.0), 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(
                parameter, std=0.02
            )  # with more, fp32 itself is 1e-6 off in OLMo 2
    twin = test_loss.float64_twin(model)
    assert (fuse(model) > 0) == (family != "GPT2")  # whose layers are not of nn.Linear
    data = tiny.examples(test_loss.LENGTHS)
    reference = tiny.naive_loss(twin, data)
    reference.backward()
    loss = PackLoss(model).train()
    notes = check_paths(loss, probe_pack(data), torch.float32)
    assert bool(notes) == tiny.runs_one_at_a_time(family)
    value = test_loss.step_gradient(loss, data, [(0, 1, 2), (3, 4, 5, 6)])
    assert value == pytest.approx(float(reference), rel=1e-6)
    assert tiny.gradient_difference(model, twin) <= 1e-6


def test_a_base_of_another_precision_gives_what_peft_gives() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8, dtype=torch.bfloat16))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    layer = next(m for m in wrapped.modules() if type(m) is Linear)
    second = layer.lora_B["default"].weight
    assert isinstance(second, torch.Tensor)
    torch.nn.init.normal_(second)
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16)
    theirs = layer(x)
    assert fuse(wrapped) == 1
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert torch.equal(layer(x), theirs)


def test_only_the_input_is_kept() -> None:
    model = adapted()
    layer = next(m for m in model.modules() if type(m) is Linear)
    assert layer.in_features is not None
    x = torch.randn(7, layer.in_features, requires_grad=True)

    def kept() -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: tensors.append(t) or t, lambda t: t
        ):
            layer(x)
        return [t for t in tensors if t.untyped_storage().data_ptr() not in known]

    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    assert kept()  # x A^T
    fuse(model)
    assert kept() == []


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}]
)
def test_what_is_not_plain_stays_with_peft(changes: dict[str, Any]) -> None:
    assert fuse(adapted(**changes)) == 0


def test_switching_the_adapter_off_or_merging_it_goes_through_peft() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fuse(model)
    ids = torch.arange(3, 30)[None]
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    expected = model(input_ids=ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    model.set_adapter("second")
    assert model(input_ids=ids).logits.shape == expected.shape


def test_it_is_recomputed_and_compiled_like_any_layer() -> None:
    model = adapted()
    fuse(model)
    layer = next(m for m in model.modules() if type(m) is LoraLinear)
    assert layer.in_features is not None
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    wanted = torch.autograd.grad(
        layer(x).square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)]
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda x: checkpoint(layer, x, use_reentrant=False)):
        got = torch.autograd.grad(
            run(x).square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)]
        )
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
