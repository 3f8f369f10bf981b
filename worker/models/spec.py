"""config.json -> ModelSpec: every number the transformer needs, or a refusal by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from worker.errors import UnsupportedModel
from worker.models.config_keys import refuse_foreign_arithmetic, unsupported
from worker.models.families import FAMILIES, Bias, Family, NameMap
from worker.models.rope_config import parse_rope
from worker.rope import RopeSpec

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class ModelSpec:
    """One model's architecture in full (unsharded) sizes."""

    family: str
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeSpec
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    max_position: int
    torch_dtype: torch.dtype  # the checkpoint's; float32 where config.json names none
    names: NameMap

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads


def load_model_spec(model_dir: Path) -> ModelSpec:
    """Read `model_dir`/config.json.

    Raises UnsupportedModel, naming key and value, for a missing file, another family, or a key
    that changes arithmetic in a way that is not implemented.
    """
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModel(f"{path}: not found; give a folder with config.json") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnsupportedModel(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{path}: holds a {type(config).__name__}, not an object")
    return parse_model_spec(config, str(path))


def parse_model_spec(config: Mapping[str, Any], source: str) -> ModelSpec:
    """As load_model_spec, from the parsed object; `source` names it in errors."""
    family = _family(config, source)
    values = _Values({**family.defaults, **config}, source)
    refuse_foreign_arithmetic(config, source)
    num_layers = values.count("num_hidden_layers")
    max_position = values.count("max_position_embeddings")
    _refuse_windows(family, values, num_layers, max_position)
    num_q_heads, head_dim = _query_heads(values)
    return ModelSpec(
        family=family.model_type,
        hidden_size=values.count("hidden_size"),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=_kv_heads(values, num_q_heads),
        head_dim=head_dim,
        ffn_size=values.count("intermediate_size"),
        vocab_size=values.count("vocab_size"),
        rms_norm_eps=values.positive("rms_norm_eps", 1e-6),
        rope=parse_rope(config, max_position, source),
        qk_norm=family.qk_norm,
        qkv_bias=values.bias("attention_bias", family.qkv_bias),
        o_bias=values.bias("attention_bias", family.o_bias, also=family.qkv_bias),
        mlp_bias=values.bias("mlp_bias", family.mlp_bias),
        tie_embeddings=values.flag("tie_word_embeddings"),
        max_position=max_position,
        torch_dtype=_checkpoint_dtype(values),
        names=family.names,
    )


class _Values:
    """Typed reads of config.json; a wrong type is refused by key and value."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source

    def refuse(self, key: str, remedy: str) -> UnsupportedModel:
        return unsupported(self.source, key, self.config.get(key), remedy)

    def count(self, key: str) -> int:
        value = self.config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.refuse(key, "give a whole number above 0")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.refuse(key, "give a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "give true or false")
        return bool(value)

    def bias(self, key: str, rule: Bias, also: Bias = Bias.NEVER) -> bool:
        """Whether a projection has a bias; `also` is the rule of another one under this key."""
        asked = self.flag(key)
        if rule is Bias.CONFIG:
            return asked
        told = self.config.get(key) is not None
        if told and asked != (rule is Bias.ALWAYS) and also is Bias.NEVER:
            raise self.refuse(key, f"this family {rule.value} has that bias")
        return rule is Bias.ALWAYS


def _family(config: Mapping[str, Any], source: str) -> Family:
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = ", ".join(FAMILIES)
        raise unsupported(source, "model_type", model_type, f"supported: {supported}")
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        remedy = f"supported for {family.model_type}: {family.architecture}"
        raise unsupported(source, "architectures", architectures, remedy)
    return family


def _query_heads(values: _Values) -> tuple[int, int]:
    """(num_q_heads, head_dim); head_dim defaults to hidden_size / heads, which must divide."""
    num_q_heads = values.count("num_attention_heads")
    if values.config.get("head_dim") is None:
        head_dim, rest = divmod(values.count("hidden_size"), num_q_heads)
        if rest or not head_dim:
            raise values.refuse("num_attention_heads", "must divide hidden_size, or give head_dim")
    else:
        head_dim = values.count("head_dim")
    if head_dim % 2:
        raise unsupported(values.source, "head_dim", head_dim, "RoPE needs an even head_dim")
    return num_q_heads, head_dim


def _kv_heads(values: _Values, num_q_heads: int) -> int:
    if values.config.get("num_key_value_heads") is None:
        return num_q_heads
    num_kv_heads = values.count("num_key_value_heads")
    if num_q_heads % num_kv_heads:
        raise values.refuse("num_key_value_heads", f"must divide num_attention_heads {num_q_heads}")
    return num_kv_heads


def _refuse_windows(family: Family, values: _Values, num_layers: int, max_position: int) -> None:
    """Sliding windows are not implemented; a window that can never bite is no window."""
    config = values.config
    layer_types = config.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        raise values.refuse("layer_types", "supported: full_attention in every layer")
    window = config.get("sliding_window")
    if family.window_switch:
        if not values.flag("use_sliding_window"):
            return
        if config.get("max_window_layers", 28) >= num_layers:
            return
    elif values.flag("use_sliding_window"):
        raise values.refuse("use_sliding_window", "supported: false")
    if window is not None and values.count("sliding_window") < max_position:
        remedy = f"supported: null, or at least max_position_embeddings {max_position}"
        raise unsupported(values.source, "sliding_window", window, remedy)


def _checkpoint_dtype(values: _Values) -> torch.dtype:
    key = "dtype" if values.config.get("dtype") is not None else "torch_dtype"
    name = values.config.get(key)
    if name is None:
        return torch.float32
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise values.refuse(key, f"supported: {', '.join(_DTYPES)}")
    return dtype
