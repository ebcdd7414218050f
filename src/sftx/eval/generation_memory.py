"""What answering the prompts of an evaluation takes in memory, beside the model."""

from __future__ import annotations

from transformers import PreTrainedConfig

from sftx.eval.generate import TOKENS_PER_BATCH

FLOAT32 = 4
LOGITS = 2
"""How often the logits of the newest token are held: as they come, and as they are chosen from."""


def most_memory(
    config: PreTrainedConfig, prompts: int, longest: int, new_tokens: int, itemsize: int
) -> int:
    """Bytes of the keys, values and logits of the largest group of prompts that `answer` takes at
    once: an upper bound, as groups are cut by `TOKENS_PER_BATCH`.

    `longest`: tokens of the longest prompt. `itemsize`: bytes of a number in keys and values. A
    model whose layers keep less than all tokens (sliding windows, states) takes less.
    """
    text = config.get_text_config()
    widest = longest + new_tokens
    tokens = min(prompts * widest, max(TOKENS_PER_BATCH, widest))
    rows = min(prompts, max(TOKENS_PER_BATCH // (new_tokens + 1), 1))
    of_a_token = 0
    queries = getattr(text, "num_attention_heads", 0)
    if queries:
        head = getattr(text, "head_dim", None) or text.hidden_size // queries
        heads = getattr(text, "num_key_value_heads", None) or queries
        of_a_token = 2 * text.num_hidden_layers * heads * head * itemsize
    return tokens * of_a_token + LOGITS * rows * text.vocab_size * FLOAT32
