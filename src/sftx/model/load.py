"""Loading a Hugging Face model, and the module that turns a pack into its loss."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sftx.config import Loss, Model
from sftx.model import attention
from sftx.model.accumulate import accumulate_in_place
from sftx.model.adapter import head_weights
from sftx.model.loss import PLAIN, LogitTransform, cross_entropy_sum, fused_cross_entropy_sum
from sftx.model.prune import WORTH_IT, LastLayer
from sftx.model.recompute import decoder_layers
from sftx.model.regularise import embedding_noise, router_balance
from sftx.types import Pack, UserError


def load_config(model: Model) -> Any:
    """The model's Hugging Face configuration; UserError if the folder does not hold one."""
    path = Path(model.path)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"model.path: {model.path} holds no config.json; a Hugging Face model folder is needed")
    try:
        return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {model.path} cannot be read as a model: {error}") from error


def stored_dtype(model: Model) -> torch.dtype:
    """`model.save_dtype`; `auto` = that of the folder the run started from."""
    if model.save_dtype != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[model.save_dtype]
    stored = load_config(model).dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def load_model(
    model: Model, device: torch.device, dtype: torch.dtype = torch.float32, nf4: torch.dtype | None = None
) -> PreTrainedModel:
    """The causal language model in `dtype` on `device`; UserError if weights are missing or do not fit.

    With `nf4`, linear layers other than the head hold 4 bits a weight and multiply in the dtype that it names.
    """
    quantised = {} if nf4 is None else {"quantization_config": _nf4(nf4), "device_map": {"": device}}
    transformers_logging.disable_progress_bar()
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            model.path,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **quantised,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.path: {model.path} cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model.path: {model.path} lacks {len(missing)} weights of {type(loaded).__name__} "
            f"(first: {missing[0]}); training would start from random numbers there"
        )
    loaded.config.use_cache = False
    for module in loaded.modules() if nf4 else ():
        # In evaluation this would pack weights for AVX-512 in bf16: inexact, and no gradient comes through any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore
    return loaded if nf4 else loaded.to(device)


def _nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise UserError("adapter.quantize: nf4 needs bitsandbytes; pip install 'sftx[qlora]'")
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return BitsAndBytesConfig(load_in_4bit=True, **settings)


class PackLoss(nn.Module):
    """A causal language model as the trainer sees it: a pack goes in, the weighted sum of its losses comes out.

    `model` may carry an adapter. The fast path runs the model's backbone over the whole pack with segment attention
    and the fused loss over its targets. `isolate = False` runs segments one at a time with the model's own attention;
    `transform = None` takes the logits from the model's own forward. Both are the slower, always faithful way, and
    `checks` turns to them when measuring shows that the fast one is not equal. `prunes`: the last layer computes only
    what targets read; set by `checks`, and best left off where a compiled layer wants one shape. `objective` holds
    while training; in evaluation the sum is the plain one. `noise_seed` is that of the step.
    """

    def __init__(self, model: PreTrainedModel, objective: Loss = PLAIN) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.noise_seed = 0
        self._noise: Tensor | None = None
        self._router_logits: tuple[Tensor, ...] = ()
        self.experts_per_token: int = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 0
        if objective.router_aux and not self.experts_per_token:
            raise UserError(f"loss.router_aux: {type(model).__name__} has no experts to balance; leave it out")
        if objective.neftune_alpha:
            model.get_input_embeddings().register_forward_hook(self._add_noise)
        self.isolate = True
        self.prunes = False
        for layer in decoder_layers(model)[-1:]:
            LastLayer(layer)
        accumulate_in_place(model.get_input_embeddings())
        self.transform: LogitTransform | None = LogitTransform()
        self.compiled: list[tuple[nn.Module, Any, Any]] = []  # layers with `forward`, compiled and own; see `compiled`
        self.own_attention = model.config._attn_implementation or "eager"
        self.use_segments(True)

    def use_segments(self, on: bool) -> None:
        """Compute attention by segments of a pack (training), or by the model's own kernel (generation, reference)."""
        self.model.set_attn_implementation(attention.NAME if on and self.isolate else self.own_attention)
        for layer, compiled, own in self.compiled:  # a graph for every length that is generated would not pay
            layer.forward = compiled if on else own

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        index: Tensor,
        label: Tensor,
        weight: Tensor,
        longest: int,
        examples: tuple[int, ...] = (),
    ) -> Tensor:
        """`ids`, `positions` int64[T]; `cu_seqlens` int32[n + 1] on the host; `index`, `label` int64[M]; `weight`
        float32[M]; `longest` = tokens in the longest segment; `examples` = their numbers, by which noise is drawn.
        Returns the sum over targets, a float32 scalar; of no targets it is 0, with a gradient of 0 for every weight."""
        objective = self.objective if self.training else PLAIN
        if objective.neftune_alpha:
            self._noise = self._draw_noise(cu_seqlens.diff().tolist(), examples)
        if not self.isolate:
            return self._one_by_one(ids, cu_seqlens, index, label, weight, objective)
        if self.transform is None:
            logits = self.own_logits(ids, positions, cu_seqlens, index, longest)
            total = cross_entropy_sum(logits, label, weight, objective)
        else:
            prunes = self.prunes and not objective.router_aux and 0 < len(index) <= WORTH_IT * len(ids)
            hidden = self.hidden(ids, positions, cu_seqlens, longest, index if prunes else None).index_select(0, index)
            head, bias = head_weights(self.model)
            total = fused_cross_entropy_sum(hidden, head, bias, label, weight, self.transform, objective)
        return total + self._balance(cu_seqlens, index, weight) if objective.router_aux else total

    def hidden(
        self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int, rows: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [T, h]; where `rows` are named, those of others need not be right."""
        segments = _segment_kwargs(cu_seqlens, longest, ids.device) | ({} if rows is None else {"rows_needed": rows})
        out = self._run(self.model.base_model, ids, position_ids=positions[None], **segments)
        return out.last_hidden_state[0]

    def own_logits(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, index: Tensor, longest: int) -> Tensor:
        """Logits [M, V] at `index` through the model's own forward, whatever it does after the head."""
        segments = _segment_kwargs(cu_seqlens, longest, ids.device)
        out = self._run(self.model, ids, position_ids=positions[None], logits_to_keep=index, **segments)
        return _keep(out.logits[0], index)

    def _one_by_one(
        self, ids: Tensor, cu_seqlens: Tensor, index: Tensor, label: Tensor, weight: Tensor, objective: Loss
    ) -> Tensor:
        total = torch.zeros((), device=ids.device)
        noise = self._noise
        for a, b in itertools.pairwise(cu_seqlens.tolist()):
            mine = (index >= a) & (index < b)
            if mine.any() or len(index) == 0:  # a pack of nothing still passes through all weights, see `forward`
                self._noise = None if noise is None else noise[a:b]
                out = self._run(self.model, ids[a:b])
                at = index[mine] - a
                total = total + cross_entropy_sum(out.logits[0][at], label[mine], weight[mine], objective)
                if objective.router_aux:
                    total = total + self._balance(torch.tensor([0, b - a], device=ids.device), at, weight[mine])
        return total

    def _run(self, module: Any, ids: Tensor, **inputs: Any) -> Any:
        """The module's output; its routers' logits are kept where the objective needs them."""
        if not (self.training and self.objective.router_aux):
            return module(input_ids=ids[None], use_cache=False, **inputs)
        out = module(input_ids=ids[None], use_cache=False, output_router_logits=True, **inputs)
        self._router_logits = getattr(out, "router_logits", None) or ()
        if not self._router_logits:
            raise UserError(f"loss.router_aux: {type(self.model).__name__} does not return its routers' logits")
        return out

    def _balance(self, cu_seqlens: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The experts' balance of each segment times the weight of its targets, summed."""
        cu_seqlens = cu_seqlens.to(index.device, non_blocking=True)
        segment = torch.bucketize(index, cu_seqlens[1:], right=True)
        share = torch.zeros(len(cu_seqlens) - 1, device=weight.device).index_add_(0, segment, weight)
        logits, self._router_logits = self._router_logits, ()
        return self.objective.router_aux * router_balance(logits, self.experts_per_token, cu_seqlens, share)

    def _draw_noise(self, lengths: list[int], examples: tuple[int, ...]) -> Tensor:
        """[T, h]; an example meets the same noise in a step wherever its pack puts it."""
        width = int(self.model.get_input_embeddings().weight.shape[1])  # pyright: ignore
        seeds = [self.noise_seed * 1_000_003 + example for example in examples or range(len(lengths))]
        return embedding_noise(lengths, width, self.objective.neftune_alpha, seeds)

    def _add_noise(self, _module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        noise, self._noise = self._noise, None  # once: whatever runs the model next is not this training pack
        return out if noise is None else out + noise.to(out)


def to_tensors(pack: Pack, device: torch.device) -> dict[str, Any]:
    """The arguments of `PackLoss.forward`, on `device` but for the borders, which the host reads too.

    Copies leave pinned memory on the stream that will use them: nobody waits, and nothing has to be ordered.
    """

    def pinned(array: Any, dtype: torch.dtype) -> Tensor:
        tensor = torch.as_tensor(array).to(dtype)
        return tensor.pin_memory() if device.type == "cuda" else tensor

    def move(array: Any, dtype: torch.dtype) -> Tensor:
        return pinned(array, dtype).to(device, non_blocking=True)

    return {
        "ids": move(pack.ids, torch.int64),
        "positions": move(pack.positions, torch.int64),
        "cu_seqlens": pinned(pack.cu_seqlens, torch.int32),
        "index": move(pack.index, torch.int64),
        "label": move(pack.label, torch.int64),
        "weight": move(pack.weight, torch.float32),
        "longest": int((pack.cu_seqlens[1:] - pack.cu_seqlens[:-1]).max()),
        "examples": pack.examples,
    }


def _segment_kwargs(borders: Tensor, longest: int, device: torch.device) -> dict[str, Any]:
    # The names are those of transformers' own variable-length kernels, so models that pass them on pass these on.
    cu_seqlens = borders.to(device, non_blocking=True)
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "borders": borders,
    }


def _keep(logits: Tensor, index: Tensor) -> Tensor:
    """Some models ignore `logits_to_keep`; then the rows are taken here."""
    return logits if logits.shape[0] == index.shape[0] else logits[index]
