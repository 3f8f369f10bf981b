"""Frequencies and tables against the published formulas' other implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.helpers.model_configs import make_config
from worker.models.rope_config import parse_rope
from worker.rope import RopeSpec, RopeType, cos_sin_table, inverse_frequencies

VARIANTS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "default", "rope_theta": 1_000_000.0},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 2.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 4096,
    },
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v['rope_type']}-{v['rope_theta']:g}")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_table_equals_transformers(variant: dict[str, Any], head_dim: int) -> None:
    rope = parse_rope({"rope_parameters": variant}, 131072, "config.json")
    config = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(variant),
    )
    positions = torch.arange(3000)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    expected = torch.cat([cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]], dim=1)
    # Angles reach thousands of radians: one float32 rounding of a frequency moves them by 1e-4.
    torch.testing.assert_close(cos_sin_table(rope, head_dim, 3000), expected, atol=6e-4, rtol=0)


def test_frequencies_of_position_zero_rotate_nothing() -> None:
    table = cos_sin_table(RopeSpec(), 8, 2)
    assert table.dtype is torch.float32 and table.shape == (2, 8)
    assert table[0].tolist() == [1.0] * 4 + [0.0] * 4


def test_llama3_keeps_short_and_divides_long_wavelengths() -> None:
    rope = RopeSpec(RopeType.LLAMA3, 500_000.0, 8.0, 8192)
    plain = inverse_frequencies(RopeSpec(theta=500_000.0), 128)
    stretched = inverse_frequencies(rope, 128)
    assert torch.equal(stretched[0], plain[0])
    torch.testing.assert_close(stretched[-1], plain[-1] / 8.0)


def test_absent_theta_is_ten_thousand() -> None:
    assert parse_rope(make_config(), 8192, "config.json").theta == 10_000.0
