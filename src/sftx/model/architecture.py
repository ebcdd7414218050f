"""Which class a model folder is loaded as, and which part of it reads and writes text.

A checkpoint of a vision-language model is loaded as the class it was saved as, the whole of it: its
text part trains, what sees or hears stays as it was, and all is saved together again.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that builds what `config` says the folder holds."""
    seeing = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if seeing is not None and seeing in (config.architectures or ()):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def beside_text(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that text never meets, by name: those outside of the decoder, the embeddings
    and the head, where the configuration has a section for text.
    """
    if model.config.get_text_config() is model.config:
        return {}
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(p) for part in parts if part is not None for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in text}
