"""Rotary position embedding: frequencies of the scaling variants, and the table kernels read.

Rotation pairs element i of a head with element i + rotary_dim / 2 (the half-split layout of
GPT-NeoX), as every checkpoint in the Hugging Face layout expects.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor


class RopeType(enum.Enum):
    """How frequencies are stretched beyond the context of pre-training."""

    DEFAULT = "default"  # RoFormer, arXiv:2104.09864
    LINEAR = "linear"  # position interpolation, arXiv:2306.15595
    LLAMA3 = "llama3"  # Llama 3.1: only long wavelengths are stretched
    YARN = "yarn"  # arXiv:2309.00071


@dataclass(frozen=True)
class RopeSpec:
    """Everything that decides the rotation angles; fields a type does not use keep defaults."""

    rope_type: RopeType = RopeType.DEFAULT
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int = 0  # llama3, yarn: context of pre-training, tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations above which nothing is stretched
    beta_slow: float = 1.0  # yarn: rotations below which everything is stretched
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: ramp bounds rounded to whole dimensions


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Default temperature of YaRN (section 3.4 of the paper): 0.1 ln(factor) + 1."""

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)


def inverse_frequencies(rope: RopeSpec, rotary_dim: int) -> Tensor:
    """Radians per position, float32 [rotary_dim // 2], highest frequency first."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.rope_type is RopeType.DEFAULT:
        return plain
    if rope.rope_type is RopeType.LINEAR:
        return plain / rope.factor
    if rope.rope_type is RopeType.LLAMA3:
        return _stretch_llama3(rope, plain)
    return _stretch_yarn(rope, plain, rotary_dim)


def _stretch_llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Short wavelengths kept, long ones divided by factor, a linear blend between."""
    wavelength = 2 * math.pi / plain
    turns = rope.original_max_position / wavelength
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - keep) * plain / rope.factor + keep * plain


def _stretch_yarn(rope: RopeSpec, plain: Tensor, rotary_dim: int) -> Tensor:
    """Blend of interpolated and plain frequencies by a ramp over the dimensions."""

    def dim_of_rotations(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dim_of_rotations(rope.beta_fast), dim_of_rotations(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    dims = torch.arange(rotary_dim // 2, dtype=torch.float32)
    stretched = ((dims - low) / width).clamp(0.0, 1.0)
    return plain / rope.factor * stretched + plain * (1 - stretched)


def cos_sin_table(rope: RopeSpec, rotary_dim: int, max_position: int) -> Tensor:
    """float32 [max_position, rotary_dim] on the CPU: cosines in the first half, then sines.

    Angles are float32 products, as in training code: at long contexts a more exact angle would
    be a different model.
    """
    positions = torch.arange(max_position, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, rotary_dim))
    return torch.cat([angles.cos(), angles.sin()], dim=1) * rope.attention_factor
