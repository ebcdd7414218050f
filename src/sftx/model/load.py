"""Loading a Hugging Face model."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import (
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from sftx.boundary import boundary
from sftx.model.architecture import auto_class
from sftx.model.folder import check_weights, load_config
from sftx.model.save import check_generation_config
from sftx.model_config import model_folder
from sftx.settings.schema import Model
from sftx.types import UserError


def stored_dtype(model: Model, config: PreTrainedConfig | None = None) -> torch.dtype:
    """`model.save_dtype`; `auto` = that of the folder the run started from, whose configuration is
    read where it is not given.
    """
    if model.save_dtype != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[model.save_dtype]
    stored = (config or load_config(model)).dtype
    if isinstance(stored, torch.dtype):
        return stored
    return torch.float32


def load_model(
    model: Model,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    nf4: torch.dtype | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """The model in `dtype` on `device`; UserError if weights are missing or do not
    fit.

    With `nf4`, linear layers other than the head hold 4 bits a weight and multiply in the dtype
    that it names.
    """
    config = config or load_config(model)
    check_weights(model.path)
    quantised = (
        {} if nf4 is None else {"quantization_config": _nf4(nf4), "device_map": {"": device}}
    )
    transformers_logging.disable_progress_bar()
    with boundary(f"model.path: {model.path} (config.json or weights) cannot be loaded"):
        loaded, report = auto_class(config).from_pretrained(
            model_folder(model.path),
            config=config,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **quantised,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model.path: {model.path} lacks {len(missing)} weights of {type(loaded).__name__} "
            f"(first: {missing[0]}); training would start from random numbers there"
        )
    check_generation_config(loaded, model.path)
    loaded.config.use_cache = False
    for module in loaded.modules() if nf4 else ():
        # In evaluation this would pack weights for AVX-512 in bf16: inexact, and no gradient comes
        # through any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
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
