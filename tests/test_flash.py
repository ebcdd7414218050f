"""The path of a GPU, run on the CPU: flash attention's kernels are replaced by the formula, all that
calls them is real. Loss and gradients against the model by itself, one example at a time.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import test_prefix_attention as formula
import tiny
import torch
from torch import Tensor

from sftx.data.pack import build_pack
from sftx.data.prefixes import build_shared_pack, shared_order
from sftx.model import attention, prefix_attention
from sftx.model.pack_loss import PackLoss, Paths, to_tensors
from sftx.types import Example, Pack

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},  # 4 heads of queries, 2 of keys
    "Mistral": {"sliding_window": 7},
    "Qwen3": {"head_dim": 8},  # norms of heads leave fp32 behind
}
FP32 = {"loss": 1e-6, "gradient": 1e-5}
BF16 = {"loss": 1e-2, "gradient": 3e-2}

pytestmark = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])


class Kernels:
    """What flash attention computes for sequences in a row; `used` holds the dtype of each call."""

    def __init__(self) -> None:
        self.used: list[torch.dtype] = []

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool = False,
    ) -> Tensor:
        self.used.append(q.dtype)
        assert q.dtype == k.dtype == v.dtype
        assert cu_q.dtype == torch.int32
        assert cu_q.equal(cu_k)
        assert enable_gqa or q.shape[1] == k.shape[1]
        left, right = window_size
        assert right == 0
        outs = []
        for a, b in zip(cu_q.tolist(), cu_q[1:].tolist(), strict=False):
            assert b - a <= max_q == max_k
            distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
            seen = (distance >= 0) & ((distance <= left) | (left < 0))
            z = formula.one_sequence(q[a:b].double(), k[a:b].double(), False, scale)
            values = v[a:b].double().repeat_interleave(q.shape[1] // v.shape[1], 1)
            p = z.masked_fill(~seen, float("-inf")).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", p, values))
        return torch.cat(outs).to(q.dtype)

    def forward(self, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """In the dtype of the kernel, with sums in fp32."""
        self.used.append(q.dtype)
        out, sums = formula.flash_forward(q, *rest)
        return out.to(q.dtype), sums

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, *rest: Any) -> Any:
        assert grad.dtype == out.dtype == q.dtype
        return tuple(x.to(q.dtype) for x in formula.flash_backward(grad, out, lse, q, *rest))


@pytest.fixture(params=[True, False], ids=["groups", "repeated"])
def kernels(
    request: pytest.FixtureRequest, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> Kernels:
    """In place of those of a GPU; in fp32 too, for which it has none, as rounding is then small."""
    found = Kernels()
    monkeypatch.setattr(attention, "estimating_gpu", True)
    monkeypatch.setattr(attention, "_HAS_GROUPS", request.param)
    monkeypatch.setattr(attention, "varlen_attn", found.varlen)
    monkeypatch.setattr(prefix_attention, "_flash_forward", found.forward)
    monkeypatch.setattr(prefix_attention, "_flash_backward", found.backward)
    if precision == torch.float32:
        monkeypatch.setattr(attention, "_flash_takes", lambda *_: True)
    return found


def assert_exact(
    loss: PackLoss, packs: list[Pack], data: list[Example], precision: torch.dtype
) -> None:
    exact = copy.deepcopy(loss.model).double()
    exact.set_attn_implementation("eager")
    reference = tiny.naive_loss(exact, data)
    reference.backward()
    weight = sum(float(example.weights[1:].sum()) for example in data)
    total = torch.zeros(())
    for pack in packs:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            value = loss(to_tensors(pack, CPU)) / weight
        value.backward()
        total += value.detach()
    limits = FP32 if precision == torch.float32 else BF16
    assert float(total) == pytest.approx(float(reference.detach()), rel=limits["loss"])
    assert tiny.gradient_difference(loss.model, exact) < limits["gradient"]


@pytest.mark.parametrize("family", FAMILIES)
def test_packs(kernels: Kernels, precision: torch.dtype, family: str) -> None:
    data = tiny.examples([5, 20, 9, 31])
    loss = PackLoss(tiny.model(family, **FAMILIES[family])).train()
    packs = [build_pack(data[:3]), build_pack(data[3:])]
    assert_exact(loss, packs, data, precision)
    assert kernels.used == [precision] * 4  # two packs, two layers


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes(kernels: Kernels, precision: torch.dtype, family: str) -> None:
    begin, *ends = tiny.examples([20, 9, 30, 17])
    data = [
        Example(np.concatenate([begin.ids, end.ids]), np.concatenate([begin.weights, end.weights]))
        for end in ends
    ]
    found = shared_order([example.ids for example in data])
    assert found is not None
    order, shared = found
    pack = build_shared_pack([data[i] for i in order], tuple(order.tolist()), shared.tolist())
    loss = PackLoss(tiny.model(family, **FAMILIES[family])).train()
    loss.take(Paths(shares_prefixes=True))
    assert_exact(loss, [pack], data, precision)
    windowed = family == "Mistral"  # merged blocks compute it
    assert kernels.used == ([] if windowed else [precision] * 4)  # two layers, two depths
