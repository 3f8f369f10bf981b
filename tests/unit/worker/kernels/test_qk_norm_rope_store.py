"""QK norm, rotation and cache store against arithmetic on complex numbers, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worker.kernels.qk_norm_rope_store import qk_norm_rope_store_reference

EPS = 1e-6


def rotate_as_complex(head: Tensor, angles: Tensor) -> Tensor:
    """head [head_dim]; dims i and i + rotary_dim / 2 are the parts of a number that is turned."""
    half = angles.shape[0]
    turned = torch.complex(head[:half], head[half : 2 * half]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag, head[2 * half :]))


def normed(head: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return head
    return head * torch.rsqrt(head.square().mean() + EPS) * weight.double()


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 20), (16, 8)])
def test_every_head_is_normed_turned_and_stored_where_its_slot_says(
    block_size: int, has_norm: bool, head_dim: int, rotary_dim: int
) -> None:
    num_tokens, num_q_heads, num_kv_heads = 7, 5, 2
    qkv = torch.randn(num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim)
    q_weight, k_weight = (torch.randn(2, head_dim)) if has_norm else (None, None)
    angles = torch.rand(30, rotary_dim // 2) * 6.0
    positions = torch.tensor([0, 1, 2, 29, 5, 5, 11])
    slot_mapping = torch.randperm(3 * 16)[:num_tokens]
    layers = torch.full((48 // block_size, 3, 2, block_size, num_kv_heads, head_dim), torch.nan)
    untouched = qkv.clone()
    q = qk_norm_rope_store_reference(
        qkv,
        q_weight,
        k_weight,
        EPS,
        torch.cat((angles.cos(), angles.sin()), dim=1),
        positions,
        slot_mapping,
        layers[:, 1, 0],
        layers[:, 1, 1],
        num_q_heads,
        num_kv_heads,
        head_dim,
    )
    assert q.shape == (num_tokens, num_q_heads, head_dim) and q.is_contiguous()
    assert torch.equal(qkv, untouched)
    heads = qkv.double().view(num_tokens, -1, head_dim)
    for token in range(num_tokens):
        turn = angles[positions[token]].double()
        block, offset = divmod(int(slot_mapping[token]), block_size)
        for head in range(num_q_heads):
            wanted = rotate_as_complex(normed(heads[token, head], q_weight), turn)
            torch.testing.assert_close(q[token, head].double(), wanted, rtol=1e-5, atol=1e-5)
        for head in range(num_kv_heads):
            wanted = rotate_as_complex(normed(heads[token, num_q_heads + head], k_weight), turn)
            stored = layers[block, 1, :, offset, head].double()
            torch.testing.assert_close(stored[0], wanted, rtol=1e-5, atol=1e-5)
            assert torch.equal(stored[1], heads[token, num_q_heads + num_kv_heads + head])
    # Nothing but the tokens' slots of this layer was written.
    assert int(layers.isfinite().sum()) == num_tokens * 2 * num_kv_heads * head_dim


def test_norm_and_rotation_are_rounded_once() -> None:
    qkv = torch.randn(3, 3 * 32).bfloat16()
    weight, angles = torch.randn(32).bfloat16(), torch.rand(4, 16)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    slots = torch.arange(3)

    def run(inputs: Tensor, scale: Tensor) -> Tensor:
        cache = torch.zeros(3, 2, 1, 1, 32, dtype=inputs.dtype)
        return qk_norm_rope_store_reference(
            inputs, scale, scale, EPS, cos_sin, slots, slots, cache[:, 0], cache[:, 1], 1, 1, 32
        )

    assert torch.equal(run(qkv, weight), run(qkv.float(), weight.float()).bfloat16())
