"""config.json of each family, without a checkpoint."""

from __future__ import annotations

from typing import Any


def make_config(model_type: str = "llama", /, **fields: Any) -> dict[str, Any]:
    """SmolLM2-135M's sizes under the family's names; `fields` replace or add keys."""
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return {
        "architectures": [f"{architecture[model_type]}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        **fields,
    }
