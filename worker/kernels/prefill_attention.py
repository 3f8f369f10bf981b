# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Causal attention of prompt chunks over the paged KV cache, cached prefix included."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tpcomm.triton_language import after_previous, early_launch
from worker.forward_batch import PrefillChunks
from worker.kernels.attention_tiles import LOG2_E, attend, padded_head_dim
from worker.kernels.head_groups import group_queries, ungroup_queries
from worker.kernels.triton_language import jit, next_power_of_2, tl

# Enough for any step, so that the number of chunks in it does not select a kernel variant.
_MIN_BLOCK_CHUNKS = 512


def prefill_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    chunks: PrefillChunks,
    scale: float,
    q_per_kv: int,
    q_offset: int,
) -> Tensor:
    """Each token attends to the cached tokens of its slot up to and including itself.

    q [num_tokens, num_q_heads, head_dim], chunk after chunk; the chunk's own k and v are in the
    cache already. Caches, block_table and head grouping as in `decode_attention`. Returns a new
    [num_tokens, num_q_heads, head_dim]; rows past the last chunk are zero.
    """
    out = torch.zeros_like(q)
    row = 0
    for slot, start, length in zip(
        chunks.host_slots, chunks.host_starts, chunks.host_lens, strict=True
    ):
        rows = slice(row, row + length)
        blocks = block_table[slot, : -(-(start + length) // k_cache.shape[1])]
        k = k_cache.index_select(0, blocks).flatten(0, 1)[: start + length]
        v = v_cache.index_select(0, blocks).flatten(0, 1)[: start + length]
        out[rows] = _attend_chunk(q[rows], k, v, scale, q_per_kv, q_offset)
        row += length
    return out


def _attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, scale: float, q_per_kv: int, q_offset: int
) -> Tensor:
    """q [length, num_q_heads, head_dim] at the end of k and v [context, num_kv_heads, head_dim]."""
    length, context, num_kv_heads = q.shape[0], k.shape[0], k.shape[1]
    grouped = group_queries(q, num_kv_heads, q_per_kv, q_offset).permute(1, 2, 0, 3)
    k_heads = k.transpose(0, 1)[:, None].expand(-1, q_per_kv, -1, -1)
    v_heads = v.transpose(0, 1)[:, None].expand(-1, q_per_kv, -1, -1)
    mask = None
    if length < context:
        mask = torch.ones(length, context, dtype=torch.bool, device=q.device)
        mask.tril_(context - length)
    attended = functional.scaled_dot_product_attention(
        grouped, k_heads, v_heads, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return ungroup_queries(attended.permute(2, 0, 1, 3), q.shape[1], q_offset)


@jit(varying=("num_tokens", "num_chunks"), unaligned=("slots_ptr", "starts_ptr", "cu_lens_ptr"))
def _prefill_attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,
    slots_ptr,
    starts_ptr,
    cu_lens_ptr,
    out_ptr,
    num_tokens,
    num_chunks,
    scale_log2,
    q_stride,
    table_stride,
    k_block_stride,
    k_token_stride,
    k_head_stride,
    v_block_stride,
    v_token_stride,
    v_head_stride,
    NUM_Q_HEADS: tl.constexpr,
    Q_PER_KV: tl.constexpr,
    Q_OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    """One program: some tokens of one chunk, times the query heads of one KV head.

    Chunk c owns the tiles from cu_lens[c] // TOKENS + c on, which leaves each chunk at least the
    tiles it needs; what lies past the last chunk is handled as one more, which is zeroed.
    """
    after_previous()
    TOKENS: tl.constexpr = BLOCK_ROWS // Q_PER_KV
    # The last tiles of a chunk see the most context: start them first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    exists = chunks <= num_chunks
    first_tiles = tl.load(cu_lens_ptr + chunks, mask=exists, other=0) // TOKENS + chunks
    chunk = tl.sum((exists & (first_tiles <= tile)).to(tl.int32), axis=0) - 1
    is_tail = chunk == num_chunks
    chunk_first = tl.load(cu_lens_ptr + chunk)
    chunk_end = tl.load(cu_lens_ptr + chunk + 1, mask=chunk < num_chunks, other=num_tokens)
    tile_first = chunk_first + (tile - chunk_first // TOKENS - chunk) * TOKENS

    rows = tl.arange(0, BLOCK_ROWS)
    tokens = tile_first + rows // Q_PER_KV
    heads = kv_head * Q_PER_KV - Q_OFFSET + rows % Q_PER_KV
    is_ours = (rows < TOKENS * Q_PER_KV) & (tokens < chunk_end)
    is_ours = is_ours & (heads >= 0) & (heads < NUM_Q_HEADS)
    dims = tl.arange(0, BLOCK_DIM)
    stored = is_ours[:, None] & (dims < HEAD_DIM)[None, :]
    tokens_long = tokens.to(tl.int64)
    out_rows = out_ptr + (tokens_long * NUM_Q_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    if is_tail:
        zeros = tl.zeros([BLOCK_ROWS, BLOCK_DIM], out_ptr.dtype.element_ty)
        tl.store(out_rows, zeros, mask=stored)
    elif tile_first < chunk_end:
        q_rows = q_ptr + (tokens_long * q_stride + heads * HEAD_DIM)[:, None]
        q = tl.load(q_rows + dims[None, :], mask=stored, other=0.0)
        start = tl.load(starts_ptr + chunk)
        query_positions = start + tokens - chunk_first
        # All rows see what the tile's first token sees; whole tiles of that need no mask.
        whole_end = (start + tile_first - chunk_first + 1) // TILE_TOKENS * TILE_TOKENS
        end = start + tl.minimum(tile_first + TOKENS, chunk_end) - chunk_first
        blocks_ptr = block_table_ptr + tl.load(slots_ptr + chunk) * table_stride
        k_head_ptr = k_cache_ptr + kv_head.to(tl.int64) * k_head_stride
        v_head_ptr = v_cache_ptr + kv_head.to(tl.int64) * v_head_stride
        out, _ = attend(
            q,
            query_positions,
            k_head_ptr,
            v_head_ptr,
            blocks_ptr,
            0,
            whole_end,
            end,
            scale_log2,
            k_block_stride,
            k_token_stride,
            v_block_stride,
            v_token_stride,
            HEAD_DIM,
            BLOCK_DIM,
            BLOCK_SIZE,
            TILE_TOKENS,
        )
        out = out.to(out_ptr.dtype.element_ty)
        tl.store(out_rows, out, mask=stored)


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    chunks: PrefillChunks,
    scale: float,
    q_per_kv: int,
    q_offset: int,
) -> Tensor:
    """`prefill_attention_reference` as one kernel that reads chunk bounds on the device.

    The launch shape depends on the token count and the number of chunks, on no length.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_chunks = chunks.slots.shape[0]
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == head_dim, k_cache.shape
    assert k_cache.stride(3) == v_cache.stride(3) == 1, (k_cache.stride(), v_cache.stride())
    assert q.stride(2) == 1 and q.stride(1) == head_dim, q.stride()
    assert q_offset >= 0 and q_offset + num_q_heads <= num_kv_heads * q_per_kv
    assert block_table.dtype == chunks.starts.dtype == chunks.cu_lens.dtype == torch.int32
    assert block_table.stride(1) == 1 and chunks.slots.dtype == torch.int64
    assert chunks.starts.shape == (num_chunks,) and chunks.cu_lens.shape == (num_chunks + 1,)
    out = torch.empty((num_tokens, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    shape = _launch_shape(head_dim, q.element_size(), q_per_kv)
    num_tiles = num_tokens // (shape.block_rows // q_per_kv) + num_chunks + 1
    _prefill_attention_kernel[(num_tiles, num_kv_heads)](
        q,
        k_cache,
        v_cache,
        block_table,
        chunks.slots,
        chunks.starts,
        chunks.cu_lens,
        out,
        num_tokens,
        num_chunks,
        scale * LOG2_E,
        q.stride(0),
        block_table.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_Q_HEADS=num_q_heads,
        Q_PER_KV=q_per_kv,
        Q_OFFSET=q_offset,
        HEAD_DIM=head_dim,
        BLOCK_DIM=padded_head_dim(head_dim),
        BLOCK_ROWS=shape.block_rows,
        BLOCK_CHUNKS=max(next_power_of_2(num_chunks + 1), _MIN_BLOCK_CHUNKS),
        BLOCK_SIZE=block_size,
        TILE_TOKENS=shape.tile_tokens,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **early_launch(),
    )
    return out


@dataclass(frozen=True)
class _LaunchShape:
    block_rows: int
    tile_tokens: int
    num_warps: int
    num_stages: int


def _launch_shape(head_dim: int, element_size: int, q_per_kv: int) -> _LaunchShape:
    """Tiles that fit the registers and 227 KiB of shared memory of sm_90."""
    whole_group = next_power_of_2(q_per_kv)
    if element_size == 4:
        # No tensor core: products are unrolled into registers, which larger tiles overflow.
        return _LaunchShape(max(32, whole_group), 32 if head_dim <= 64 else 16, 4, 1)
    if head_dim > 128:
        return _LaunchShape(max(64, whole_group), 64, 8, 2)
    return _LaunchShape(max(128, whole_group), 128, 8, 3)
