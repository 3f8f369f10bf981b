"""Tiny random checkpoints of every family, in the Hugging Face layout, written by transformers.

Sizes are chosen against the grain: vocabularies that no granule divides, FFN sizes with a partial
granule, head_dim unequal to hidden_size / heads, KV heads that ranks do not divide.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers

_BASE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 301,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(rope_type: str, theta: float = 10_000.0, **fields: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **fields}}


_LLAMA3_ROPE = _rope(
    "llama3",
    theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

# name -> (config class, what differs from the base)
TINY_MODELS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        # SmolLM2's proportions: 9 query and 3 KV heads, tied.
        "llama": (
            "LlamaConfig",
            {
                "hidden_size": 72,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "head_dim": 8,
                "tie_word_embeddings": True,
            },
        ),
        "llama3_rope": ("LlamaConfig", {**_LLAMA3_ROPE, "num_key_value_heads": 6}),
        "llama_linear_rope": ("LlamaConfig", _rope("linear", factor=4.0)),
        "llama_biases": (
            "LlamaConfig",
            {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 3},
        ),
        "mistral": (
            "MistralConfig",
            {"sliding_window": None, "num_key_value_heads": 1, "vocab_size": 128},
        ),
        "qwen2": (
            "Qwen2Config",
            {
                "hidden_size": 96,
                "num_attention_heads": 12,
                "head_dim": 8,
                "use_sliding_window": False,
            },
        ),
        "qwen2_yarn_tied": (
            "Qwen2Config",
            {
                **_rope("yarn", factor=4.0, original_max_position_embeddings=64),
                "tie_word_embeddings": True,
                "vocab_size": 131,
            },
        ),
        "qwen3": ("Qwen3Config", {"head_dim": 24, "num_key_value_heads": 3}),
        "qwen3_tied_biases": (
            "Qwen3Config",
            {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True},
        ),
    }
)


def tiny_config(name: str, **overrides: Any) -> Any:
    """The transformers config of a tiny model."""
    class_name, fields = TINY_MODELS[name]
    return getattr(transformers, class_name)(**{**_BASE, **fields, **overrides})


def write_tiny_model(
    model_dir: Path,
    name: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "1GB",
    seed: int = 0,
    **overrides: Any,
) -> Any:
    """Write config.json and safetensors of a random model; returns transformers' own, in eval mode.

    Norms and biases are random too (transformers starts them at 1 and 0, which would hide one left
    out), and weights are large enough for logits to spread over several units. A small
    `max_shard_size` gives several files with an index.
    """
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name, **overrides))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                center = 0.0 if parameter_name.endswith("bias") else 1.0
                parameter.copy_(center + 0.2 * noise)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[1] ** 0.5))
    model = model.to(dtype).eval()
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(model_dir, max_shard_size=max_shard_size)
    return model
