"""Tiny dense models whose every parameter matters, saved as their families save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.hf_checkpoint import HFCheckpoint
from trainer.upcycle.dense import DenseModel, dense_model

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# every dense family, with what it can have that others cannot
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"head_dim": 12, "sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "gemma": ("gemma", {"head_dim": 8}),
    "phi3": ("phi3", {}),
}


def random_model(family: str, *, seed: int = 0, **fields: Any) -> Any:
    """A model of a dense family in float32 with random norms and biases."""
    config = AutoConfig.for_model(family, **{**SIZES, **fields})
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            assert parameter.any(), name
    return model.eval()


def saved(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> DenseModel:
    """The model in a folder, opened."""
    model.to(dtype).save_pretrained(folder)
    return dense_model(HFCheckpoint(folder))


@torch.no_grad()
def logits(model: Any, seed: int = 0) -> torch.Tensor:
    """Of random tokens [B, T, V] in float32, longer than the windows."""
    tokens = torch.randint(3, SIZES["vocab_size"], (2, 24), generator=torch.manual_seed(seed))
    return model(tokens).logits.float()
