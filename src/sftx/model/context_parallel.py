"""Context parallelism: a pack that several ranks compute together, each a part of its tokens.

Every layer works token by token but attention, where a token needs those before it. There the ranks
of a group exchange: each gives its tokens of all heads and gets all tokens of its share of the
heads, computes attention as if it were alone, and gives back (DeepSpeed Ulysses, arXiv:2309.14509).
So any attention of ours serves, whatever segments, windows or caps it knows. Grouped-query heads of
keys and values are repeated only until every rank gets as many of them.

The gradient of a weight is the sum over the tokens, so that the sum over all ranks, which the step
takes anyway, is that of whole packs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig

from sftx import distributed
from sftx.model.attention import NAME, repeat_heads, segment_attention
from sftx.types import Pack, UserError

FILLER = 2**31 - 1
"""The number of the example that fills a pack up to equal parts; it carries no weight."""


@dataclass(frozen=True, slots=True)
class Context:
    """The ranks that compute a pack together: how many, which of them this one is, and the name of
    their process group ("" where nothing but shapes is asked for).
    """

    size: int
    rank: int
    group: str

    def filled(self, pack: Pack) -> Pack:
        """The pack with a last segment without weight, so that its tokens make equal parts."""
        lacking = -len(pack.ids) % self.size
        if not lacking:
            return pack
        end = np.array([len(pack.ids) + lacking], np.int32)
        return replace(
            pack,
            ids=np.concatenate([pack.ids, np.zeros(lacking, np.int32)]),
            positions=np.concatenate([pack.positions, np.arange(lacking, dtype=np.int32)]),
            cu_seqlens=np.concatenate([pack.cu_seqlens, end]),
            examples=(*pack.examples, FILLER) if pack.examples else (),
        )

    def part(self, tokens: int) -> slice:
        """Those of this rank, of so many `tokens` of a pack that is `filled`."""
        each = tokens // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


def times_of(pack: Pack) -> tuple[int, ...]:
    """How many examples each segment is part of: none, where it only fills the pack."""
    if pack.times is not None:
        return tuple(pack.times.tolist())
    numbers = pack.examples or (FILLER,) * (len(pack.cu_seqlens) - 1)
    return tuple(int(number != FILLER) for number in numbers)


def group_and_count(context: Context | None) -> tuple[int, int]:
    """The number of the group that computes this rank's packs, and how many groups there are."""
    size = 1 if context is None else context.size
    return distributed.rank() // size, distributed.world_size() // size


def check_heads(config: PreTrainedConfig, size: int) -> None:
    """UserError where the heads cannot be dealt to `size` ranks."""
    heads = config.get_text_config().num_attention_heads
    if heads % size:
        raise UserError(
            f"runtime.context_parallel: {size} ranks cannot share {heads} attention heads equally; "
            f"take one of {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}"
        )


@torch.library.custom_op("sftx::exchange", mutates_args=())
def exchange(x: Tensor, group: str) -> Tensor:
    """`x` [N, ...]: part j goes to rank j of the group, and part i of the result came from rank i.

    Done twice, it is undone; so it is its own backward pass.
    """
    x = x.contiguous()
    received = torch.empty_like(x)
    named: Any = torch_dist.distributed_c10d
    torch_dist.all_to_all_single(received, x, group=named._resolve_process_group(group))
    return received


@exchange.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _save_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _give_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return exchange(grad, ctx.group), None


exchange.register_autograd(_give_back, setup_context=_save_group)


def share_of_heads(x: Tensor, size: int, group: str) -> Tensor:
    """[1, H, T / N, D], this rank's tokens of all heads -> [1, H / N, T, D], all tokens of its
    heads.
    """
    _, heads, tokens, width = x.shape
    parts = exchange(x.reshape(size, heads // size, tokens, width), group)
    return parts.transpose(0, 1).reshape(1, heads // size, size * tokens, width)


def share_of_tokens(x: Tensor, size: int, group: str) -> Tensor:
    """[1, T, H / N, D], all tokens of this rank's heads -> [1, T / N, H, D], its tokens of all
    heads.
    """
    _, tokens, heads, width = x.shape
    parts = exchange(x.reshape(size, tokens // size, heads, width), group)
    return parts.transpose(0, 1).reshape(1, tokens // size, size * heads, width)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    s_aux: Tensor | None = None,
    context_size: int = 1,
    context_rank: int = 0,
    context_group: str = "",
    **rest: Any,
) -> tuple[Tensor, None]:
    """`segment_attention`, of which each of `context_size` ranks computes a share of the heads.

    `query` [1, H, T / N, D], `key` and `value` [1, H_kv, T / N, D] are this rank's tokens; so is
    the result, [1, T / N, H, D]. `s_aux` [H] are the sinks of all heads; the segments are those of
    all T tokens.
    """
    if context_size == 1:
        return segment_attention(module, query, key, value, attention_mask, s_aux=s_aux, **rest)
    heads = query.shape[1]
    enough = _key_heads(heads, key.shape[1], context_size)
    query, key, value = (
        share_of_heads(x, context_size, context_group)
        for x in (query, repeat_heads(key, enough), repeat_heads(value, enough))
    )
    if s_aux is not None:
        s_aux = s_aux.chunk(context_size)[context_rank]
    # Keys and values were made equally many for every rank, and no more.
    out, _ = segment_attention(module, query, key, value, attention_mask, s_aux=s_aux, **rest)
    return share_of_tokens(out, context_size, context_group), None


def _key_heads(heads: int, key_heads: int, size: int) -> int:
    """How many heads of keys there must be so that each of `size` ranks gets its queries' own."""
    repeated = key_heads * (size // gcd(key_heads, size))
    return repeated if heads % repeated == 0 else heads


AttentionInterface.register(NAME, attention)
