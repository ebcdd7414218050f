"""The model of the quick start before it has learned anything: a tiny Llama with random weights,
and its tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"
# A dialogue is <|user|> question<|end|><|assistant|> answer<|end|> and so on.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{ "<|" + message.role + "|> " + message.content + "<|end|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|assistant|>" }}{%- endif -%}"""


def make_model(folder: Path, texts: Iterable[str], seed: int, hidden: int, layers: int) -> int:
    """Write the model and its tokenizer to `folder`; the vocabulary is learned from `texts`.
    Returns its parameters.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[USER, ASSISTANT, END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(folder))

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=backend.token_to_id(END),
        pad_token_id=backend.token_to_id(END),
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(str(folder))
    return model.num_parameters()
