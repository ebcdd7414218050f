"""Loading a Hugging Face model, and the module that turns a pack into its loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sftx.boundary import boundary
from sftx.model import attention
from sftx.model.adapter import bare, head_weights
from sftx.model.checks.forward_state import ForwardState
from sftx.model.folder import check_weights, load_config
from sftx.model.loss import PLAIN, LogitTransform, cross_entropy_sum, fused_cross_entropy_sum
from sftx.model.regularization import embedding_noise, router_balance
from sftx.settings.schema import Loss, Model
from sftx.types import Pack, UserError


def stored_dtype(model: Model) -> torch.dtype:
    """`model.save_dtype`; `auto` = that of the folder the run started from."""
    if model.save_dtype != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[model.save_dtype]
    stored = load_config(model).dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def load_model(
    model: Model,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    nf4: torch.dtype | None = None,
) -> PreTrainedModel:
    """The causal language model in `dtype` on `device`; UserError if weights are missing or do not
    fit.

    With `nf4`, linear layers other than the head hold 4 bits a weight and multiply in the dtype
    that it names.
    """
    config = load_config(model)
    check_weights(model.path)
    quantised = (
        {} if nf4 is None else {"quantization_config": _nf4(nf4), "device_map": {"": device}}
    )
    transformers_logging.disable_progress_bar()
    with boundary(f"model.path: {model.path} (config.json or weights) cannot be loaded"):
        loaded, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            model.path,
            config=config,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **quantised,
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model.path: {model.path} lacks {len(missing)} weights of {type(loaded).__name__} "
            f"(first: {missing[0]}); training would start from random numbers there"
        )
    loaded.config.use_cache = False
    for module in loaded.modules() if nf4 else ():
        # In evaluation this would pack weights for AVX-512 in bf16: inexact, and no gradient comes
        # through any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore
    loaded = loaded if nf4 else loaded.to(device)
    with (
        boundary(f"model.path: {model.path} cannot compute with what its config.json says"),
        torch.no_grad(),
    ):
        loaded(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    return loaded


def _nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise UserError("adapter.quantize: nf4 needs bitsandbytes; pip install 'sftx[qlora]'")
    settings = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute,
    }
    return BitsAndBytesConfig(load_in_4bit=True, **settings)


@dataclass(frozen=True, slots=True)
class TensorPack:
    """A `Pack` as tensors on the device, but for the borders of its segments, which stay on the
    host.
    """

    ids: Tensor  # int64[T]
    positions: Tensor  # int64[T]
    cu_seqlens_cpu: Tensor  # int32[n + 1]
    index: Tensor  # int64[M]
    label: Tensor  # int64[M]
    weight: Tensor  # float32[M]
    longest: int  # tokens of the longest segment
    counts: tuple[int, ...]  # targets of each segment
    examples: tuple[int, ...]  # their numbers, by which noise is drawn

    def segments(self) -> dict[str, Any]:
        """What `attention` needs to know; under the names of transformers' own kernels, so that
        models pass it on.
        """
        cu_seqlens, longest = (
            self.cu_seqlens_cpu.to(self.ids.device, non_blocking=True),
            self.longest,
        )
        lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        return {
            **lengths,
            "max_length_q": longest,
            "max_length_k": longest,
            "cu_seqlens_cpu": self.cu_seqlens_cpu,
        }

    def parts(self) -> Iterator[tuple[int, int, Tensor, slice]]:
        """(first token, one past the last, places of its targets in it, which targets they are) of
        every segment.
        """
        first = 0
        for (a, b), count in zip(
            itertools.pairwise(self.cu_seqlens_cpu.tolist()), self.counts, strict=True
        ):
            mine = slice(first, first + count)
            first += count
            yield a, b, self.index[mine] - a, mine


def to_tensors(pack: Pack, device: torch.device) -> TensorPack:
    """The pack as `PackLoss` takes it.

    Copies leave pinned memory on the stream that will use them: nobody waits, and nothing has to be
    ordered.
    """

    def pinned(array: Any, dtype: torch.dtype) -> Tensor:
        tensor = torch.as_tensor(array).to(dtype)
        return tensor.pin_memory() if device.type == "cuda" else tensor

    def move(array: Any, dtype: torch.dtype) -> Tensor:
        return pinned(array, dtype).to(device, non_blocking=True)

    targets_before = np.searchsorted(pack.index, pack.cu_seqlens)
    return TensorPack(
        ids=move(pack.ids, torch.int64),
        positions=move(pack.positions, torch.int64),
        cu_seqlens_cpu=pinned(pack.cu_seqlens, torch.int32),
        index=move(pack.index, torch.int64),
        label=move(pack.label, torch.int64),
        weight=move(pack.weight, torch.float32),
        longest=int((pack.cu_seqlens[1:] - pack.cu_seqlens[:-1]).max()),
        counts=tuple(np.diff(targets_before).tolist()),
        examples=pack.examples,
    )


class PackLoss(nn.Module):
    """A causal language model as the trainer sees it: a pack goes in, the weighted sum of its
    losses comes out.

    `model` may carry an adapter. The fast path runs the model's backbone over the whole pack with
    segment attention and the fused loss over its targets. `isolate = False` runs segments one at a
    time with the model's own attention; `transform = None` takes the logits from the model's own
    forward. Both are the slower, always faithful way, and `checks` turns to them when measuring
    shows that the fast one is not equal. `forgets` is put back before every segment that runs
    alone: a model may remember something of the one before. `objective` holds while training; in
    evaluation the sum is the plain one. `noise_seed` is that of the step.
    """

    def __init__(self, model: PreTrainedModel, objective: Loss = PLAIN) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.noise_seed = 0
        self._noise: Tensor | None = None
        self._router_logits: tuple[Tensor, ...] = ()
        self.experts_per_token: int = (
            getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 0
        )
        if objective.router_aux and not self.experts_per_token:
            raise UserError(
                f"loss.router_aux: {type(model).__name__} has no experts to balance; leave it out"
            )
        if objective.neftune_alpha:
            model.get_input_embeddings().register_forward_hook(self._add_noise)
        self.isolate = True
        self.forgets: ForwardState | None = None
        self.transform: LogitTransform | None = LogitTransform()
        self.compiled: list[
            tuple[nn.Module, Any, Any]
        ] = []  # layers with `forward`, compiled and own; see `compiled`
        self.own_attention = model.config._attn_implementation or "eager"
        self.use_segments(True)

    def use_segments(self, on: bool) -> None:
        """Compute attention by segments of a pack (training), or by the model's own kernel
        (generation, reference).
        """
        self.model.set_attn_implementation(
            attention.NAME if on and self.isolate else self.own_attention
        )
        for (
            layer,
            compiled,
            own,
        ) in self.compiled:  # a graph for every length that is generated would not pay
            layer.forward = compiled if on else own

    def forward(self, pack: TensorPack) -> Tensor:
        """The sum over targets, a float32 scalar; of no targets it is 0, with a gradient of 0 for
        every weight.
        """
        objective = self.objective if self.training else PLAIN
        if objective.neftune_alpha:
            self._noise = self._draw_noise(pack)
        if not self.isolate:
            return self._one_by_one(pack, objective)
        if self.transform is None:
            total = cross_entropy_sum(self.own_logits(pack), pack.label, pack.weight, objective)
        else:
            hidden = self.hidden(pack).index_select(0, pack.index)
            head, bias = head_weights(self.model)
            total = fused_cross_entropy_sum(
                hidden, head, bias, pack.label, pack.weight, self.transform, objective
            )
        return (
            total + self._balance(pack.cu_seqlens_cpu, pack.index, pack.weight)
            if objective.router_aux
            else total
        )

    def hidden(self, pack: TensorPack) -> Tensor:
        """Hidden states after the final norm, [T, h]."""
        positions = pack.positions[None]
        return self._run(
            self.model.base_model, pack.ids, position_ids=positions, **pack.segments()
        ).last_hidden_state[0]

    def own_logits(self, pack: TensorPack) -> Tensor:
        """Logits [M, V] at `pack.index` through the model's own forward, whatever it does after the
        head.
        """
        more = {"position_ids": pack.positions[None], "logits_to_keep": pack.index}
        logits = self._run(self.model, pack.ids, **pack.segments(), **more).logits[0]
        return (
            logits if len(logits) == len(pack.index) else logits[pack.index]
        )  # some models ignore `logits_to_keep`

    def run_one_by_one(self) -> None:
        """Run segments one at a time from now on, with the model's own attention."""
        self.isolate = False
        self.use_segments(False)

    def logits_one_by_one(self, pack: TensorPack) -> Tensor:
        """Logits [M, V] at `pack.index`, segments one at a time."""
        return torch.cat([self._logits_alone(pack.ids[a:b])[at] for a, b, at, _ in pack.parts()])

    def _logits_alone(self, ids: Tensor) -> Tensor:
        """Logits [T, V] of one segment, whatever ran before it."""
        if self.forgets is not None:
            self.forgets.put_back()
        return self._run(self.model, ids).logits[0]

    def _one_by_one(self, pack: TensorPack, objective: Loss) -> Tensor:
        total = torch.zeros((), device=pack.ids.device)
        noise = self._noise
        for a, b, at, mine in pack.parts():
            if (
                len(at) or len(pack.index) == 0
            ):  # a pack of nothing still passes through all weights, see `forward`
                self._noise = None if noise is None else noise[a:b]
                logits = self._logits_alone(pack.ids[a:b])[at]
                total = total + cross_entropy_sum(
                    logits, pack.label[mine], pack.weight[mine], objective
                )
                if objective.router_aux:
                    total = total + self._balance(torch.tensor([0, b - a]), at, pack.weight[mine])
        return total

    def _run(self, module: Any, ids: Tensor, **inputs: Any) -> Any:
        """The module's output; its routers' logits are kept where the objective needs them."""
        if not (self.training and self.objective.router_aux):
            return module(input_ids=ids[None], use_cache=False, **inputs)
        out = module(input_ids=ids[None], use_cache=False, output_router_logits=True, **inputs)
        self._router_logits = getattr(out, "router_logits", None) or ()
        if not self._router_logits:
            raise UserError(
                f"loss.router_aux: {type(self.model).__name__} does not return its routers' logits"
            )
        return out

    def _balance(self, cu_seqlens_cpu: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The experts' balance of each segment times the weight of its targets, summed."""
        cu_seqlens = cu_seqlens_cpu.to(index.device, non_blocking=True)
        segment = torch.bucketize(index, cu_seqlens[1:], right=True)
        share = torch.zeros(len(cu_seqlens) - 1, device=weight.device).index_add_(
            0, segment, weight
        )
        logits, self._router_logits = self._router_logits, ()
        return self.objective.router_aux * router_balance(
            logits, self.experts_per_token, cu_seqlens, share
        )

    def _draw_noise(self, pack: TensorPack) -> Tensor:
        """[T, h]; an example meets the same noise in a step wherever its pack puts it."""
        lengths = pack.cu_seqlens_cpu.diff().tolist()
        width = int(bare(self.model.get_input_embeddings()).weight.shape[1])
        seeds = [
            self.noise_seed * 1_000_003 + example
            for example in pack.examples or range(len(lengths))
        ]
        return embedding_noise(lengths, width, self.objective.neftune_alpha, seeds)

    def _add_noise(self, _module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        noise, self._noise = (
            self._noise,
            None,
        )  # once: whatever runs the model next is not this training pack
        return out if noise is None else out + noise.to(out)
