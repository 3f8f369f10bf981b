"""Which keys of config.json change arithmetic, and the one value of each that we compute.

A key that the parsers in spec.py and rope_config.py honour is not listed here. A key listed
here must be absent or hold a neutral value; anything else is refused by name, because a model
that runs with a term left out answers wrongly without saying so. The remaining keys are
metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from worker.errors import UnsupportedModel

_ABSENT: Final = (None, False, 0)
_ONE: Final = (None, 1, 1.0)

# key -> values that leave the arithmetic as it is here
NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        # activations and norms
        "hidden_act": ("silu", "swish"),
        "hidden_activation": (None, "silu", "swish"),
        "layer_norm_eps": (None,),
        "norm_type": (None, "rms_norm", "rmsnorm"),
        "use_qk_norm": _ABSENT,
        "qk_norm": _ABSENT,
        "qk_layernorm": _ABSENT,
        "parallel_residual": _ABSENT,
        "use_parallel_residual": _ABSENT,
        # position
        "partial_rotary_factor": _ONE,
        "rotary_pct": _ONE,
        "rotary_dim": (None,),
        "rope_interleaved": _ABSENT,
        "alibi": _ABSENT,
        "position_embedding_type": (None, "rope", "absolute"),
        "no_rope_layers": (None, []),
        "no_rope_layer_interval": _ABSENT,
        # attention
        "attention_chunk_size": _ABSENT,
        "attn_temperature_tuning": _ABSENT,
        "attn_logit_softcapping": _ABSENT,
        "attention_multiplier": (None,),
        "query_pre_attn_scalar": (None,),
        "clip_qkv": _ABSENT,
        "attention_sinks": _ABSENT,
        "is_encoder_decoder": _ABSENT,
        "add_cross_attention": _ABSENT,
        # scaling of embeddings, residuals and logits
        "embedding_multiplier": _ONE,
        "residual_multiplier": _ONE,
        "scale_emb": _ONE,
        "scale_embedding": _ABSENT,
        "scale_depth": (None,),
        "mup_width_scale": _ONE,
        "logit_scale": _ONE,
        "logits_scaling": _ONE,
        "final_logit_softcapping": _ABSENT,
        "lm_head_bias": _ABSENT,
        # structure
        "pretraining_tp": (None, 0, 1),
        "num_experts": _ABSENT,
        "num_local_experts": _ABSENT,
        "n_routed_experts": _ABSENT,
        "moe_intermediate_size": _ABSENT,
        "num_key_value_shared_layers": _ABSENT,
        "num_kv_shared_layers": _ABSENT,
        "quantization_config": (None,),
        "compression_config": (None,),
        "quantization": (None,),
    }
)


def refuse_foreign_arithmetic(config: Mapping[str, Any], source: str) -> None:
    """Raise UnsupportedModel for the first key whose value is not neutral."""
    for key, neutral in NEUTRAL_VALUES.items():
        if key in config and config[key] not in neutral:
            raise unsupported(source, key, config[key], f"supported: {_listed(neutral)}")


def unsupported(source: str, key: str, value: object, remedy: str) -> UnsupportedModel:
    """The error for one key, worded the same way everywhere."""
    return UnsupportedModel(f"{source}: {key} = {_shortened(value)} is not supported; {remedy}")


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join("absent" if value is None else repr(value) for value in values)


def _shortened(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
