"""How much memory answering prompts takes, beside the model, and how many are answered at once."""

from __future__ import annotations

from transformers import PreTrainedConfig

TOKENS_PER_BATCH = 16_384
"""Tokens of prompts and answers, padding included, that are generated together at most."""
SHARE = 0.8
"""Of the free memory, what a batch may be predicted to take."""
FLOAT32 = 4
LOGITS = 2
"""How often the logits of the newest token are held: as they come, and as they are chosen from."""
HIDDEN = 8
"""Arrays as wide as the hidden state that a layer makes of each token: what comes in and what goes
out, their norm, queries, and keys and values repeated for all heads.
"""
INNER = 3
"""Arrays as wide as the inside of an MLP: the gate, the other factor, their product."""


def rows_at_once(
    config: PreTrainedConfig, longest: int, new_tokens: int, itemsize: int, free: int | None
) -> int:
    """How many prompts of up to `longest` tokens are answered together: as many as `free` bytes hold
    (None: as much as it takes) and `TOKENS_PER_BATCH` allows, at least one.
    """
    most = TOKENS_PER_BATCH // (longest + new_tokens)
    if free is not None:
        of_a_row = bytes_of_row(config, longest, new_tokens, itemsize)
        most = min(most, int(SHARE * free) // of_a_row)
    return max(most, 1)


def bytes_of_row(config: PreTrainedConfig, longest: int, new_tokens: int, itemsize: int) -> int:
    """What one prompt of `longest` tokens and its answer take: keys and values of all layers, what
    one layer makes of all its tokens at once, the mask of its attention, and logits.

    An upper bound. `itemsize`: bytes of a number in keys and values. A model whose layers keep less
    than all tokens (sliding windows, states) takes less.
    """
    text = config.get_text_config()
    tokens = longest + new_tokens
    of_a_token = 0
    queries = getattr(text, "num_attention_heads", 0)
    if queries:
        head = getattr(text, "head_dim", None) or text.hidden_size // queries
        heads = getattr(text, "num_key_value_heads", None) or queries
        of_a_token = 2 * text.num_hidden_layers * heads * head
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    of_a_token += HIDDEN * text.hidden_size + INNER * inner
    mask = longest * tokens
    return (tokens * of_a_token + mask) * itemsize + LOGITS * text.vocab_size * FLOAT32
