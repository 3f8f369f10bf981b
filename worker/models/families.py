"""The model families: each a small declaration, never a copy of the transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Final


class Bias(Enum):
    """Where a family's projections get their biases from."""

    NEVER = "never"
    ALWAYS = "always"
    CONFIG = "config"  # decided by attention_bias or mlp_bias in config.json


@dataclass(frozen=True)
class NameMap:
    """Checkpoint names; `{layer}` is the layer number, projections end in .weight or .bias."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    input_norm: str = "model.layers.{layer}.input_layernorm.weight"
    post_attention_norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    q_norm: str = "model.layers.{layer}.self_attn.q_norm.weight"
    k_norm: str = "model.layers.{layer}.self_attn.k_norm.weight"
    q: str = "model.layers.{layer}.self_attn.q_proj"
    k: str = "model.layers.{layer}.self_attn.k_proj"
    v: str = "model.layers.{layer}.self_attn.v_proj"
    o: str = "model.layers.{layer}.self_attn.o_proj"
    gate: str = "model.layers.{layer}.mlp.gate_proj"
    up: str = "model.layers.{layer}.mlp.up_proj"
    down: str = "model.layers.{layer}.mlp.down_proj"


@dataclass(frozen=True)
class Family:
    """What distinguishes one family's arithmetic from another's.

    `defaults` are the values that config.json files of this family may leave out, where they
    are not the same for all families.
    """

    model_type: str
    architecture: str
    qkv_bias: Bias = Bias.NEVER
    o_bias: Bias = Bias.NEVER
    mlp_bias: Bias = Bias.NEVER
    qk_norm: bool = False
    window_switch: bool = False  # sliding_window counts only where use_sliding_window is true
    defaults: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    names: NameMap = NameMap()


LLAMA: Final = Family(
    "llama",
    "LlamaForCausalLM",
    qkv_bias=Bias.CONFIG,
    o_bias=Bias.CONFIG,
    mlp_bias=Bias.CONFIG,
)
# A Mistral config.json without the key means a window of 4096, so absence is not "none".
MISTRAL: Final = Family(
    "mistral", "MistralForCausalLM", defaults=MappingProxyType({"sliding_window": 4096})
)
QWEN2: Final = Family("qwen2", "Qwen2ForCausalLM", qkv_bias=Bias.ALWAYS, window_switch=True)
QWEN3: Final = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    qkv_bias=Bias.CONFIG,
    o_bias=Bias.CONFIG,
    qk_norm=True,
    window_switch=True,
    defaults=MappingProxyType({"head_dim": 128}),
)

FAMILIES: Final = MappingProxyType({f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3)})
