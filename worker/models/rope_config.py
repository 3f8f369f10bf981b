"""RoPE as config.json spells it: `rope_theta` with `rope_scaling`, or `rope_parameters`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from worker.models.config_keys import unsupported
from worker.rope import RopeSpec, RopeType, yarn_attention_factor

_DEFAULT_THETA: Final = 10_000.0
_ALLOWED: Final[Mapping[RopeType, frozenset[str]]] = {
    RopeType.DEFAULT: frozenset(),
    RopeType.LINEAR: frozenset({"factor"}),
    RopeType.LLAMA3: frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    RopeType.YARN: frozenset(
        {
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_EVERYWHERE: Final = frozenset(
    {
        "type",
        "rope_type",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "finetuned",
    }
)


def parse_rope(config: Mapping[str, Any], max_position: int, source: str) -> RopeSpec:
    """Read either spelling. Raises UnsupportedModel for what would change the angles unseen."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(key) or {}
    if not isinstance(scaling, Mapping):
        raise unsupported(source, key, scaling, "give an object")
    name = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        rope_type = RopeType(name)
    except ValueError:
        choices = ", ".join(t.value for t in RopeType)
        raise unsupported(source, f"{key}.rope_type", name, f"supported: {choices}") from None
    for unknown in sorted(set(scaling) - _EVERYWHERE - _ALLOWED[rope_type]):
        if scaling[unknown] is not None:
            remedy = f"no meaning with rope type {rope_type.value}"
            raise unsupported(source, f"{key}.{unknown}", scaling[unknown], remedy)
    partial = scaling.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise unsupported(source, f"{key}.partial_rotary_factor", partial, "supported: 1.0")
    return _build(rope_type, _Numbers(scaling, key, source), config, max_position)


class _Numbers:
    """Reads numbers out of the scaling object; a wrong type is refused by name."""

    def __init__(self, scaling: Mapping[str, Any], key: str, source: str) -> None:
        self._scaling, self._key, self._source = scaling, key, source

    def optional(self, name: str) -> float | None:
        value = self._scaling.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise unsupported(self._source, f"{self._key}.{name}", value, "give a number above 0")
        return float(value)

    def required(self, name: str) -> float:
        value = self.optional(name)
        if value is None:
            raise unsupported(self._source, f"{self._key}.{name}", None, "this rope type needs it")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._scaling.get(name, default)
        if not isinstance(value, bool):
            raise unsupported(self._source, f"{self._key}.{name}", value, "give true or false")
        return value


def _build(
    rope_type: RopeType, numbers: _Numbers, config: Mapping[str, Any], max_position: int
) -> RopeSpec:
    theta = numbers.optional("rope_theta") or float(config.get("rope_theta") or _DEFAULT_THETA)
    if rope_type is RopeType.DEFAULT:
        return RopeSpec(theta=theta)
    if rope_type is RopeType.LINEAR:
        return RopeSpec(rope_type, theta, numbers.required("factor"))
    # A top-level original_max_position_embeddings takes precedence in the reference code too.
    original = config.get("original_max_position_embeddings") or numbers.optional(
        "original_max_position_embeddings"
    )
    original_max_position = int(original or max_position)
    if rope_type is RopeType.LLAMA3:
        return RopeSpec(
            rope_type,
            theta,
            numbers.required("factor"),
            original_max_position,
            low_freq_factor=numbers.required("low_freq_factor"),
            high_freq_factor=numbers.required("high_freq_factor"),
        )
    factor = numbers.optional("factor") or max_position / original_max_position
    attention_factor = numbers.optional("attention_factor") or yarn_attention_factor(
        factor, numbers.optional("mscale"), numbers.optional("mscale_all_dim")
    )
    return RopeSpec(
        rope_type,
        theta,
        factor,
        original_max_position,
        beta_fast=numbers.optional("beta_fast") or 32.0,
        beta_slow=numbers.optional("beta_slow") or 1.0,
        attention_factor=attention_factor,
        truncate=numbers.flag("truncate", True),
    )
