"""Tiny random configurations of the model families that the tests run through."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED: dict[str, Any] = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
LOCAL_EXPERTS: dict[str, Any] = {
    "intermediate_size": 24,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN: dict[str, Any] = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL_EXPERTS,
    "qwen2_moe": {
        **QWEN,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {**QWEN, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**ROUTED, **LATENT_ATTENTION, "first_k_dense_replace": 1},
    "deepseek_v3": {
        **ROUTED,
        **LATENT_ATTENTION,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_mtp_layers": 0,
    },
    "glm4_moe": {
        **ROUTED,
        "first_k_dense_replace": 0,
        "head_dim": 8,
        "use_qk_norm": True,
        "num_mtp_layers": 0,
    },
    "gpt_oss": {
        **LOCAL_EXPERTS,
        "head_dim": 8,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "ernie4_5_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 1,
        "moe_k": 2,
        "moe_layer_start_index": 0,
        "tie_word_embeddings": True,
    },
    "dots1": {**ROUTED, "first_k_dense_replace": 1, "head_dim": 8},
    "phimoe": {**LOCAL_EXPERTS, "router_jitter_noise": 0.0, "lm_head_bias": True},
    "granitemoe": LOCAL_EXPERTS,
    "minimax": {**LOCAL_EXPERTS, "head_dim": 8, "block_size": 8},
    "hunyuan_v1_moe": {
        "intermediate_size": 24,
        "num_experts": 8,
        "moe_topk": 2,
        "head_dim": 8,
    },
    "qwen3_next": {
        **QWEN,
        "head_dim": 8,
        "shared_expert_intermediate_size": 40,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """A two-layer configuration of a family: hidden 32, 8 experts, top-2, vocabulary 64, eager
    attention and experts; every value can be overridden."""
    fields = {**COMMON, **FAMILIES[family], **overrides}
    config = AutoConfig.for_model(family, **fields)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config
