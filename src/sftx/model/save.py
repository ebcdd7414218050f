"""Writing a Hugging Face folder that serves what was trained: weights, tokenizer, template, stop
tokens, card.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from sftx.boundary import boundary
from sftx.files import make_folder, sync
from sftx.model.shard import whole_state
from sftx.model_config import model_folder
from sftx.settings.schema import Model

PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files by which servers of a vision-language model prepare images."""


def load_tokenizer(model: Model) -> Any:
    """The tokenizer as transformers and its servers load it, with the tokens the run adds."""
    path = model_folder(model.tokenizer or model.path)
    with boundary(f"model.tokenizer: {path} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        tokenizer("a")  # where a setting of it has a wrong type, this fails
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in model.add_tokens])
    special = [
        AddedToken(text, normalized=False, special=True) for text in model.add_special_tokens
    ]
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def serving_config(model: PreTrainedModel, tokenizer: Any, stop_ids: list[int]) -> GenerationConfig:
    """The model's generation config, whose EOS now includes every token that training taught to
    stop at.
    """
    config = _generation_config(model)
    before = config.eos_token_id
    eos = [*stop_ids, *(before if isinstance(before, list) else [] if before is None else [before])]
    config.eos_token_id = list(dict.fromkeys(eos)) or None
    if config.pad_token_id is None and tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def check_generation_config(model: PreTrainedModel, path: str) -> None:
    """Refuse now, before training, what could not be written with the trained model."""
    config = _generation_config(model)
    with boundary(f"model.path: {path}: generation_config.json cannot be saved with the model"):
        config.validate(strict=True)


def _generation_config(model: PreTrainedModel) -> GenerationConfig:
    """A copy of the model's own. One that names a temperature or a share samples: some published
    folders forget to say so, and transformers refuses to save that.
    """
    config = GenerationConfig.from_dict((model.generation_config or GenerationConfig()).to_dict())
    settings = (config.temperature, config.top_p, config.top_k)
    if config.do_sample or all(value is None for value in settings):
        return config
    samples = config.temperature not in (None, 1.0) or config.top_p not in (None, 1.0)
    config.do_sample = True if samples else None
    return config


def save_model(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    stop_ids: list[int],
    card: str,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write model (or adapter), tokenizer, generation config and README.md into `folder`.

    Everything is written beside and moved in at the end, so a crash leaves no half-written weights
    under final names; all of it is on the disk when this returns. Matrices of a whole model are
    stored in `dtype`; adapters always in float32. `state` holds the tensors where those of `model`
    are in shards. A file of weights holds at most `max_shard_size`, as transformers takes it.
    """
    temporary = folder / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if isinstance(model, PeftModel):
            # The rows of added tokens are in the adapter; whole embeddings beside them would only
            # bar servers from it.
            model.save_pretrained(str(temporary), state_dict=state, save_embedding_layers=False)
            _sort_sets(temporary / "adapter_config.json", model)
        else:
            if state is None:
                state = whole_state(model, dtype, trained_only=False)  # tied weights stay one
            kept = model.config.dtype
            model.config.dtype = dtype
            model.save_pretrained(str(temporary), state_dict=state, max_shard_size=max_shard_size)
            model.config.dtype = kept
            _copy_processor(base, temporary)
        tokenizer.save_pretrained(str(temporary))
        serving_config(base, tokenizer, stop_ids).save_pretrained(str(temporary))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        # More templates have a folder.
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            sync(path)
            final = folder / path.relative_to(temporary)
            make_folder(final.parent)
            path.replace(final)
            sync(final.parent)
    finally:
        shutil.rmtree(temporary)


def _copy_processor(model: PreTrainedModel, folder: Path) -> None:
    """Put what prepares images for a vision-language model beside it, as its folder has it."""
    for name in PROCESSOR:
        source = Path(model.name_or_path or "") / name
        if source.is_file():
            shutil.copyfile(source, folder / name)


def _sort_sets(path: Path, model: PeftModel) -> None:
    """Put what peft holds as a set (the adapted modules) in order: it writes it as it comes, in
    every process anew.
    """
    told = json.loads(path.read_text(encoding="utf-8"))
    for config in model.peft_config.values():
        for name, value in vars(config).items():
            if isinstance(value, set):
                told[name] = sorted(value)
    path.write_text(json.dumps(told, indent=2, sort_keys=True), encoding="utf-8")
