# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""From the QKV projection to attention: QK norm, rotary embedding, and the store into the cache.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, in the
layout that rotates the two halves of a head against each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tpcomm.triton_language import after_previous, early_launch
from worker.kernels.triton_language import jit, next_power_of_2, tl


def qk_norm_rope_store_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Tensor:
    """Normalise (if weights are given) and rotate q and k, write k and v to the cache, return q.

    qkv [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim], left alone; q_weight and k_weight
    [head_dim], both or neither; cos_sin float32 [max_position, rotary_dim], cosines in the first
    half; positions and slot_mapping int64 [num_tokens], a slot being block * block_size + offset;
    caches [num_blocks, block_size, num_kv_heads, head_dim], any strides. Dims of a head from
    rotary_dim on are not rotated. Returns a new q [num_tokens, num_q_heads, head_dim]. Norm and
    rotation in float32, rounded once. Tokens that share a slot (padding) leave either's values.
    """
    heads = qkv.view(qkv.shape[0], num_q_heads + 2 * num_kv_heads, head_dim)
    q_and_k = heads[:, : num_q_heads + num_kv_heads]
    if q_weight is not None and k_weight is not None:
        q = functional.rms_norm(
            q_and_k[:, :num_q_heads].float(), (head_dim,), q_weight.float(), eps
        )
        k = functional.rms_norm(
            q_and_k[:, num_q_heads:].float(), (head_dim,), k_weight.float(), eps
        )
        q_and_k = torch.cat((q, k), dim=1)
    rotated = _rotate_halves(q_and_k, cos_sin.index_select(0, positions)).to(qkv.dtype)
    block_size = k_cache.shape[1]
    block_ids = slot_mapping // block_size
    offsets = slot_mapping % block_size
    k_cache[block_ids, offsets] = rotated[:, num_q_heads:]
    v_cache[block_ids, offsets] = heads[:, num_q_heads + num_kv_heads :]
    return rotated[:, :num_q_heads].contiguous()


def _rotate_halves(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """heads [num_tokens, num_heads, head_dim], cos_sin [num_tokens, rotary_dim] -> float32."""
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    first, second = heads[..., :rotary_dim].float().chunk(2, dim=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if rotary_dim < heads.shape[-1]:
        parts.append(heads[..., rotary_dim:].float())
    return torch.cat(parts, dim=-1)


@jit(unaligned=("positions_ptr", "slot_mapping_ptr"))
def _qk_norm_rope_store_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    slot_mapping_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    qkv_stride,
    k_block_stride,
    k_token_stride,
    k_head_stride,
    v_block_stride,
    v_token_stride,
    v_head_stride,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    after_previous()
    HALF: tl.constexpr = ROTARY_DIM // 2
    NUM_QK_HEADS: tl.constexpr = NUM_Q_HEADS + NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    in_head = dims < HEAD_DIM
    is_q = heads < NUM_Q_HEADS
    is_k = (heads >= NUM_Q_HEADS) & (heads < NUM_QK_HEADS)
    is_v = (heads >= NUM_QK_HEADS) & (heads < NUM_QK_HEADS + NUM_KV_HEADS)

    head_rows = qkv_ptr + token * qkv_stride + heads * HEAD_DIM
    raw = tl.load(head_rows + dims, mask=(is_q | is_k | is_v) & in_head, other=0.0)
    # Each dim needs its partner in the other half: a second load, which the cache answers.
    in_rotary = dims < ROTARY_DIM
    partner_dims = tl.where(dims < HALF, dims + HALF, dims - HALF)
    partner = tl.load(head_rows + partner_dims, mask=(is_q | is_k) & in_rotary, other=0.0)
    x = raw.to(tl.float32)
    partner = partner.to(tl.float32)
    if HAS_NORM:
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        q_weight = tl.load(q_weight_ptr + dims, mask=in_head, other=0.0)
        k_weight = tl.load(k_weight_ptr + dims, mask=in_head, other=0.0)
        q_partner_weight = tl.load(q_weight_ptr + partner_dims, mask=in_rotary, other=0.0)
        k_partner_weight = tl.load(k_weight_ptr + partner_dims, mask=in_rotary, other=0.0)
        x *= inverse_rms * tl.where(is_q, q_weight, k_weight).to(tl.float32)
        partner *= inverse_rms * tl.where(is_q, q_partner_weight, k_partner_weight).to(tl.float32)

    angles = cos_sin_ptr + tl.load(positions_ptr + token) * ROTARY_DIM + dims % HALF
    cos = tl.load(angles, mask=in_rotary, other=1.0)
    sin = tl.load(angles + HALF, mask=in_rotary, other=0.0)
    rotated = x * cos + tl.where(dims < HALF, -partner, partner) * sin
    rotated = rotated.to(q_ptr.dtype.element_ty)

    q_rows = q_ptr + token * NUM_Q_HEADS * HEAD_DIM + heads * HEAD_DIM
    tl.store(q_rows + dims, rotated, mask=is_q & in_head)
    slot = tl.load(slot_mapping_ptr + token)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    k_rows = k_cache_ptr + block * k_block_stride + offset * k_token_stride
    tl.store(k_rows + (heads - NUM_Q_HEADS) * k_head_stride + dims, rotated, mask=is_k & in_head)
    v_rows = v_cache_ptr + block * v_block_stride + offset * v_token_stride
    tl.store(v_rows + (heads - NUM_QK_HEADS) * v_head_stride + dims, raw, mask=is_v & in_head)


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Tensor:
    """`qk_norm_rope_store_reference` as one kernel, a program for some heads of one token."""
    num_tokens = qkv.shape[0]
    num_heads = num_q_heads + 2 * num_kv_heads
    assert qkv.shape[1] == num_heads * head_dim and qkv.stride(1) == 1, qkv.shape
    assert (q_weight is None) == (k_weight is None)
    assert cos_sin.is_contiguous() and cos_sin.shape[1] <= head_dim, cos_sin.shape
    assert positions.dtype == slot_mapping.dtype == torch.int64
    assert k_cache.shape == v_cache.shape and k_cache.shape[2:] == (num_kv_heads, head_dim)
    assert k_cache.stride(3) == v_cache.stride(3) == 1, (k_cache.stride(), v_cache.stride())
    q = torch.empty((num_tokens, num_q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    # Few tokens: spread over the GPU. Many: give each program enough bytes to be worth its start.
    block_heads = 4 if num_tokens <= 256 else 16
    _qk_norm_rope_store_kernel[(num_tokens, -(-num_heads // block_heads))](
        qkv,
        q_weight,
        k_weight,
        cos_sin,
        positions,
        slot_mapping,
        q,
        k_cache,
        v_cache,
        eps,
        qkv.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos_sin.shape[1],
        BLOCK_SIZE=k_cache.shape[1],
        HAS_NORM=q_weight is not None,
        BLOCK_HEADS=block_heads,
        BLOCK_DIM=next_power_of_2(head_dim),
        num_warps=4 if block_heads == 16 else 2,
        **early_launch(),
    )
    return q
