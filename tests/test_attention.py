"""Segment attention: every kernel against plain attention, and none that makes the host wait for
the device.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sftx.data.pack import build_pack
from sftx.model import attention, cpu_attention
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.training.step import train_step

BORDERS = torch.tensor([0, 5, 6, 29, 40], dtype=torch.int32)


def states(
    heads: tuple[int, int, int] = (4, 2, 2), dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, count, 40, 8, dtype=dtype, requires_grad=True) for count in heads]


def plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """The formula with one mask over the whole pack, float64, [1, H, T, D]."""
    segment = torch.bucketize(torch.arange(40), BORDERS[1:], right=True)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    visible = (segment[:, None] == segment) & (distance >= 0) & (distance < (window or 40))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(1, -1, 40, 1)], dim=-1)
    return torch.softmax(scores, dim=-1)[..., :40] @ v


def compare(options: dict[str, Any], tolerance: float, sinks: Tensor | None = None) -> None:
    """`segment_attention` against `plain`: values and all gradients."""
    exact = states()
    ours = [x.detach().float().requires_grad_() for x in exact]
    our_sinks = None if sinks is None else sinks.detach().float().requires_grad_()
    out, _ = attention.segment_attention(
        torch.nn.Module(), *ours, None, scaling=0.3, s_aux=our_sinks,
        cu_seq_lens_q=BORDERS, max_length_q=32, cu_seqlens_cpu=BORDERS, **options,
    )  # fmt: skip
    window, softcap = options.get("sliding_window") or 0, options.get("softcap") or 0.0
    expected = plain(*exact, 0.3, window, softcap, sinks).transpose(1, 2)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    leaves, twins = (our_sinks, sinks) if sinks is not None else (None, None)
    found = torch.autograd.grad(
        (out * weights.float()).sum(), [*ours, *([leaves] if leaves is not None else [])]
    )
    wanted = torch.autograd.grad(
        (expected * weights).sum(), [*exact, *([twins] if twins is not None else [])]
    )
    largest = max(
        float(x.norm()) for x in wanted
    )  # a window of one token has no gradient for queries and keys
    for a, b in zip((out, *found), (expected, *wanted), strict=True):
        assert a.shape == b.shape
        assert float((a - b).detach().norm()) <= tolerance * largest


@pytest.mark.parametrize("window", [None, 1, 7, 23])
@pytest.mark.parametrize(
    ("softcap", "sinks"), [(None, False), (1.5, False), (None, True), (2.0, True)]
)
@pytest.mark.parametrize("rows", [1, 5, 128])
def test_blocks_are_plain_attention(
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    rows: int,
) -> None:
    monkeypatch.setattr(cpu_attention, "ROWS", rows)
    column = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_() if sinks else None
    with torch.autocast("cpu", torch.bfloat16, enabled=rows == 5):  # rounds no product
        compare({"sliding_window": window, "softcap": softcap}, 1e-6, column)


def test_dropout_falls_only_on_what_is_seen() -> None:
    """With every value 1, a head's output is the share of its probabilities that was kept, scaled
    up.
    """
    q, k, v = states((4, 4, 4), torch.float32)
    out, _ = attention.segment_attention(
        torch.nn.Module(), q, k, torch.ones_like(v), None, dropout=0.5, softcap=2.0,
        cu_seq_lens_q=BORDERS, max_length_q=32, cu_seqlens_cpu=BORDERS,
    )  # fmt: skip
    assert set(out[0, 5].detach().unique().tolist()) <= {
        0.0,
        2.0,
    }  # a segment of one token: kept or not
    assert 0.8 < float(out.detach().mean()) < 1.2


@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize(("softcap", "sinks"), [(0.0, False), (1.5, False), (2.0, True)])
def test_the_way_that_drops_is_plain_attention_where_nothing_is_dropped(
    window: int, softcap: float, sinks: bool
) -> None:
    exact = states((4, 4, 4))
    column = torch.linspace(-1, 1, 4, dtype=torch.float64) if sinks else None
    out = cpu_attention.by_segment(
        *(x.float() for x in exact), column, BORDERS, 0.3, window, softcap, 0.0
    )
    expected = plain(*exact, 0.3, window, softcap, column)
    assert float((out - expected).detach().norm() / expected.detach().norm()) <= 1e-6


@pytest.mark.parametrize(
    ("options", "flash"),
    [
        ({}, True),
        ({"softcap": 2.0}, False),
        ({"s_aux": torch.zeros(4)}, False),
        ({"dropout": 0.5}, False),
    ],
)
def test_flash_attention_is_left_to_what_it_computes(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], flash: bool
) -> None:
    """It knows neither soft-capping nor sinks nor dropout: on a GPU these go another way."""
    kernels: list[str] = []
    monkeypatch.setattr(attention, "rehearsing_gpu", True)
    monkeypatch.setattr(
        attention, "_varlen", lambda q, *_: kernels.append("flash") or q.transpose(1, 2)
    )
    given = [x.detach() for x in states(dtype=torch.bfloat16)]
    attention.segment_attention(
        torch.nn.Module(),
        *given,
        None,
        cu_seq_lens_q=BORDERS,
        max_length_q=32,
        cu_seqlens_cpu=BORDERS,
        **options,
    )
    assert kernels == ["flash"] * flash


def test_no_segments_no_attention() -> None:
    with pytest.raises(ValueError, match="without segments"):
        attention.segment_attention(
            torch.nn.Module(), *states(), None, cu_seq_lens_q=BORDERS, max_length_q=32
        )


def test_a_mask_of_the_models_own_is_not_passed_over() -> None:
    """Doge's adds to the scores, and beyond 2,048 tokens hides keys: a short probe sees little of
    it.
    """
    with pytest.raises(ValueError, match="with a mask"):
        attention.segment_attention(
            torch.nn.Module(),
            *states(),
            torch.zeros(1, 1, 1, 1),
            cu_seq_lens_q=BORDERS,
            max_length_q=32,
            cu_seqlens_cpu=BORDERS,
        )


@pytest.mark.parametrize("has_groups", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_the_arguments_of_the_cuda_kernel(
    monkeypatch: pytest.MonkeyPatch, has_groups: bool, window: int | None
) -> None:
    """The kernel is replaced by one that does what its documentation says; grouped heads are asked
    for or repeated.
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
               window_size: tuple[int, int], **groups: bool) -> Tensor:  # fmt: skip
        assert groups == ({"enable_gqa": True} if has_groups else {})
        assert k.shape[1] == (2 if has_groups else 4)
        assert cu_q is cu_k is BORDERS
        assert max_q == max_k == 32
        left, right = window_size
        assert right == 0  # causal
        seen = [x.transpose(0, 1)[None].double() for x in (q, k, v)]
        return (
            plain(*seen, scale, 0 if left == -1 else left + 1, 0.0, None)[0].transpose(0, 1).float()
        )

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_HAS_GROUPS", has_groups)
    ours = [x.detach().float() for x in states()]
    out = attention._varlen(*ours, BORDERS, 32, 0.3, window or 0)
    expected = plain(*states(), 0.3, window or 0, 0.0, None).transpose(1, 2)
    assert float((out - expected).detach().norm() / expected.detach().norm()) <= 1e-6


@pytest.mark.parametrize(
    ("shape", "dtype", "takes"),
    [
        ((1, 32, 16384, 128), torch.bfloat16, True),
        ((1, 32, 16384, 128), torch.float32, False),
        ((1, 4, 64, 12), torch.bfloat16, False),
        ((1, 4, 64, 264), torch.bfloat16, False),
        ((1, 32, 600_000, 128), torch.bfloat16, False),  # its counters have 32 bits
    ],
)
def test_what_flash_attention_takes(
    shape: tuple[int, ...], dtype: torch.dtype, takes: bool
) -> None:
    q = torch.empty(shape, dtype=dtype, device="meta")
    assert attention._flash_takes(q, q, BORDERS) is takes
    assert not attention._flash_takes(q, q[..., :-4], BORDERS)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Mistral", {"sliding_window": 7}),
        ("Gemma2", {"head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 3.0}),
        ("GPT2", {"attn_pdrop": 0.1}),
    ],
)
def test_a_step_on_cuda_reads_nothing_back(
    monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]
) -> None:
    """The path of an accelerator on tensors without data: whatever asks the device for a value
    raises there.
    """
    kernels = []
    varlen = attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *a: kernels.append(a[0].dtype) or varlen(*a))
    # There is no autocast on tensors without data: the weights are bf16 instead.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    device = torch.device("meta")
    loss = PackLoss(tiny.model(family, **changes).to(device, torch.bfloat16))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.0)
    monkeypatch.setattr(optimizer, "step", lambda: None)  # the fused kernel has no such path
    packs = [
        to_tensors(build_pack(tiny.examples(lengths)), device) for lengths in ([5, 20, 9], [31])
    ]
    result = train_step(loss, optimizer, packs, 7.0, 1e-3, 1.0, nullcontext)
    assert result.loss.is_meta
    flash = family in ("Llama", "Qwen3", "Mistral")
    assert kernels == ([torch.bfloat16] * 4 if flash else [])  # two packs, two layers
    with pytest.raises(RuntimeError, match="meta"):
        result.loss.item()


def test_custom_ops_are_well_formed() -> None:
    q, k, v = (x.detach().float().requires_grad_() for x in states((2, 2, 2)))
    sinks = torch.zeros(2, requires_grad=True)
    for softcap, column in ((0.0, None), (2.0, sinks)):
        arguments = (q, k, v, column, BORDERS, 0.3, 7, softcap)
        torch.library.opcheck(
            cpu_attention.segments, arguments, test_utils=("test_schema", "test_faketensor")
        )
