"""Attention over shared prefixes: every kernel, merged, against plain attention with one mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from trees import BUSHY, Tree, path_of, trees

from sftx.model import attention, prefix_attention, prefix_blocks
from sftx.model.pack_loss import TensorPack, to_tensors

CPU = torch.device("cpu")


def visible(tree: Tree, window: int) -> Tensor:
    """bool[T, T]: what each token sees."""
    pack = tree.pack
    assert pack.parent is not None
    parents = pack.parent.tolist()
    lengths = np.diff(pack.cu_seqlens)
    segment = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    related = torch.zeros(len(lengths), len(lengths), dtype=torch.bool)
    for number in range(len(lengths)):
        related[number, path_of(parents, number)] = True
    positions = torch.from_numpy(pack.positions)
    distance = positions[:, None] - positions
    near = (distance >= 0) & (distance < (window or len(positions)))
    return related[segment][:, segment] & near


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """The formula with one mask over the whole pack, float64, [1, T, H, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    z = q @ k.transpose(-1, -2) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z = z.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        z = torch.cat([z, sinks.reshape(1, -1, 1, 1).expand(1, -1, len(seen), 1)], dim=-1)
    return (torch.softmax(z, dim=-1)[..., : len(seen)] @ v).transpose(1, 2)


def states(tokens: int, heads: tuple[int, int, int] = (4, 2, 2)) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, h, tokens, 8, dtype=torch.float64).requires_grad_() for h in heads]


def attend(ours: list[Tensor], pack: TensorPack, **options: Any) -> Tensor:
    segments = pack.segments()
    q, k, v = ours
    return attention.segment_attention(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        scaling=0.3,
        cu_seq_lens_q=segments["cu_seq_lens_q"],
        max_length_q=pack.longest,
        cu_seqlens_cpu=pack.cu_seqlens_cpu,
        prefix_index=segments["prefix_index"],
        **options,
    )[0]


def compare(tree: Tree, window: int = 0, softcap: float = 0.0, sinks: bool = False) -> float:
    """The largest difference of output and gradients in fp32, relative to the largest norm."""
    exact = states(len(tree.pack.ids))
    column = torch.linspace(-1, 1, 4, dtype=torch.float64) if sinks else None
    ours = [x.detach().float().requires_grad_() for x in exact]
    if column is not None:
        exact.append(column.requires_grad_())
        ours.append(column.detach().float().requires_grad_())
    options = {"sliding_window": window, "softcap": softcap, "s_aux": ours[3] if sinks else None}
    out = attend(ours[:3], to_tensors(tree.pack, CPU), **options)
    q, k, v = exact[:3]
    expected = plain(q, k, v, visible(tree, window), 0.3, softcap, column)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    found = torch.autograd.grad((out * weights.float()).sum(), ours)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    largest = max(float(x.norm()) for x in wanted)
    pairs = zip((out, *found), (expected, *wanted), strict=True)
    return max(float((a - b).detach().norm()) for a, b in pairs) / largest


@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize(
    ("softcap", "sinks"), [(0.0, False), (1.5, False), (0.0, True), (2.0, True)]
)
@pytest.mark.parametrize("rows", [8, 128])
def test_merged_blocks_are_plain_attention(
    monkeypatch: pytest.MonkeyPatch, window: int, softcap: float, sinks: bool, rows: int
) -> None:
    monkeypatch.setattr(prefix_blocks, "ROWS", rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=rows == 8):  # rounds no product
        assert compare(BUSHY, window, softcap, sinks) < 1e-6


@settings(max_examples=15, deadline=None)
@given(trees().filter(lambda tree: bool(to_tensors(tree.pack, CPU).prefixes)))
def test_any_tree(tree: Tree) -> None:
    assert compare(tree, window=5, softcap=2.0, sinks=True) < 1e-6
    assert compare(tree) < 1e-6


def one_sequence(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """Scores [H, q, k] of a sequence: [q, H, D], [k, H_kv, D]."""
    z = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    return z.masked_fill(torch.ones_like(z).triu(1) > 0, float("-inf")) if causal else z


def at(x: Tensor, places: Tensor | None) -> Tensor:
    return x.float() if places is None else x[places].float()


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, part: Any, scale: float
) -> tuple[Tensor, Tensor]:
    """What flash attention returns for sequences of queries and keys."""
    q, k, v = at(q, part.queries), at(k, part.keys), at(v, part.keys)
    outs, sums = [], []
    assert part.cu_q.tolist() == part.bounds_q
    assert part.cu_k.tolist() == part.bounds_k
    for a, b, c, d in zip(part.cu_q, part.cu_q[1:], part.cu_k, part.cu_k[1:], strict=False):
        assert b - a <= part.longest()[0]
        assert d - c <= part.longest()[1]
        z = one_sequence(q[a:b], k[c:d], part.causal, scale)
        values = v[c:d].repeat_interleave(q.shape[1] // v.shape[1], 1)
        outs.append(torch.einsum("hqk,khd->qhd", z.softmax(-1), values))
        sums.append(z.logsumexp(-1).t())
    return torch.cat(outs), torch.cat(sums)


def flash_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    part: Any,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What flash attention's backward pass computes from `out` and `lse`, whatever these are."""
    q, k, v = at(q, part.queries), at(k, part.keys), at(v, part.keys)
    grad, out, lse = (at(x, part.queries) for x in (grad, out, lse))
    totals = [torch.zeros_like(x) for x in (q, k, v)]
    for a, b, c, d in zip(part.cu_q, part.cu_q[1:], part.cu_k, part.cu_k[1:], strict=False):
        groups = q.shape[1] // k.shape[1]
        keys, values = (x[c:d].repeat_interleave(groups, 1) for x in (k, v))
        p = (one_sequence(q[a:b], k[c:d], part.causal, scale) - lse[a:b].t()[..., None]).exp()
        d_p = torch.einsum("qhd,khd->hqk", grad[a:b], values)
        d_z = p * (d_p - (grad[a:b] * out[a:b]).sum(-1).t()[..., None]) * scale
        totals[0][a:b] += torch.einsum("hqk,khd->qhd", d_z, keys)
        d_k = torch.einsum("hqk,qhd->khd", d_z, q[a:b])
        d_v = torch.einsum("hqk,qhd->khd", p, grad[a:b])
        totals[1][c:d] += d_k.unflatten(1, (-1, groups)).sum(2)
        totals[2][c:d] += d_v.unflatten(1, (-1, groups)).sum(2)
    return totals[0], totals[1], totals[2]


@pytest.mark.parametrize("has_groups", [True, False])
def test_flash_attention_is_merged(monkeypatch: pytest.MonkeyPatch, has_groups: bool) -> None:
    """The kernel is replaced by one that does what it does; grouped heads are asked for or repeated."""
    used = []
    monkeypatch.setattr(attention, "estimating_gpu", True)
    monkeypatch.setattr(attention, "_HAS_GROUPS", has_groups)
    monkeypatch.setattr(attention, "_flash_takes", lambda *_: True)
    monkeypatch.setattr(
        prefix_attention,
        "_flash_forward",
        lambda *a: used.append(a[1].shape[1]) or flash_forward(*a),
    )
    monkeypatch.setattr(prefix_attention, "_flash_backward", flash_backward)
    assert compare(BUSHY) < 1e-6
    assert used == [2 if has_groups else 4] * 4  # itself, and three depths
    assert compare(BUSHY, window=7) < 1e-6
    assert compare(BUSHY, softcap=2.0) < 1e-6
    assert compare(BUSHY, sinks=True) < 1e-6
    assert len(used) == 4


def test_custom_ops_are_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = to_tensors(BUSHY.pack, CPU)
    q, k, v = (x.detach().float().requires_grad_() for x in states(len(pack.ids), (2, 2, 2)))
    sinks = torch.zeros(2, requires_grad=True)
    index = pack.segments()["prefix_index"]
    tried = ("test_schema", "test_faketensor")
    for softcap, column in ((0.0, None), (2.0, sinks)):
        arguments = (q, k, v, column, index, 0.3, 7, softcap)
        torch.library.opcheck(prefix_blocks.shared_blocks, arguments, test_utils=tried)
    monkeypatch.setattr(prefix_attention, "_flash_forward", flash_forward)
    monkeypatch.setattr(prefix_attention, "_flash_backward", flash_backward)
    torch.library.opcheck(prefix_attention.shared_flash, (q, k, v, index, 0.3), test_utils=tried)


def test_what_drops_attention_does_not_share() -> None:
    pack = to_tensors(BUSHY.pack, CPU)
    with pytest.raises(ValueError, match="drops keys"):
        attend(states(len(pack.ids)), pack, dropout=0.1)
