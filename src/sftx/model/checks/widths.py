"""Names, in configurations, of numbers that are widths or counts, and how small they become in a
stand-in.
"""

from __future__ import annotations

HEADS = {
    "decoder_attention_heads",
    "encoder_attention_heads",
    "n_head",
    "n_heads",
    "num_attention_heads",
    "num_heads",
}
KEY_HEADS = {"num_key_value_heads", "num_kv_heads", "n_head_kv"}
HIDDEN = {
    "hidden_size",
    "n_embd",
    "d_model",
    "dim",
    "embedding_size",
    "word_embed_proj_dim",
    "attention_hidden_size",
}
INNER = {
    "decoder_ffn_dim",
    "encoder_ffn_dim",
    "expert_ffn_hidden_size",
    "ffn_dim",
    "ffn_hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "n_inner",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
}
EXPERTS = {"moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts"}
CHOSEN_EXPERTS = {
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
}
LAYERS = {"n_layer", "n_layers", "num_hidden_layers", "num_layers"}
VOCABULARY = {"encoder_hash_byte_group_vocab", "vocab_size", "vocab_size_per_layer_input"}
RANKS = {"kv_lora_rank", "o_lora_rank", "q_lora_rank"}
LINEAR_HEADS = {"linear_num_key_heads", "linear_num_value_heads"}
LINEAR_DIMS = {"linear_key_head_dim", "linear_value_head_dim"}
OTHER_WIDTHS = {
    "head_dim",
    "v_head_dim",
    "qk_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "global_head_dim",
    "hidden_size_per_layer_input",
    "lru_width",
    "n_group",
    "num_expert_group",
    "topk_group",
    "num_key_value_groups",
    "query_pre_attn_scalar",
    "rope_theta",
    "rope_local_base_freq",
    "default_theta",
    "rotary_emb_base",
    "pretraining_tp",
    "num_global_key_value_heads",
    "max_window_layers",
    "first_k_dense_replace",
}
WIDTHS = (
    HEADS
    | KEY_HEADS
    | HIDDEN
    | INNER
    | EXPERTS
    | CHOSEN_EXPERTS
    | LAYERS
    | VOCABULARY
    | RANKS
    | LINEAR_HEADS
    | LINEAR_DIMS
    | OTHER_WIDTHS
)
"""Names, in configurations, of numbers that are no lengths: they are never compared with a
position.
"""

LIMITS = {
    **dict.fromkeys(INNER, 64),
    **dict.fromkeys(CHOSEN_EXPERTS, 2),
    **dict.fromkeys(VOCABULARY, 128),
    **dict.fromkeys(RANKS, 32),
    **dict.fromkeys(LINEAR_DIMS, 16),
}
"""What is left, at most, of a width in the stand-in."""

MIXERS = (
    ("expand", "num_heads", "head_dim"),
    ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
    ("mamba_expand", "n_mamba_heads", "mamba_headdim"),
)
"""Names of three numbers of a mixer with states: the first, times the width of the model, is the
product of the others.
"""
