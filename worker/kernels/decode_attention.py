# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Attention of one new token per row over the paged KV cache.

On CUDA the context of a row is split over several programs, as in Dao et al., "Flash-Decoding for
long-context inference", 2023, and a second kernel joins the parts in a fixed order. The query heads
of one KV head share a program, so that its keys and values are read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tpcomm.triton_language import after_previous, early_launch
from worker.kernels.attention_tiles import LOG2_E, attend, padded_head_dim
from worker.kernels.head_groups import group_queries, ungroup_queries
from worker.kernels.triton_language import jit, next_power_of_2, tl

_MAX_SPLITS = 64
_MIN_SPLIT_TOKENS = 128
_PROGRAMS_PER_SM = 2
_MANY_SPLITS = 8


@dataclass(frozen=True)
class Tile:
    """How a program goes through its context: `num_tokens` at a time, `num_stages` on their way."""

    num_tokens: int
    num_warps: int = 4
    num_stages: int = 3


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    lens: Tensor,
    scale: float,
    q_per_kv: int,
    q_offset: int,
) -> Tensor:
    """softmax(q k^T * scale) v for each row over the first `lens[row]` tokens of its slot.

    q [num_rows, num_q_heads, head_dim]; caches [num_blocks, block_size, num_kv_heads, head_dim],
    any strides; block_table int32 [num_slots, max_blocks_per_seq]; slots int64 [num_rows]; lens
    int32 [num_rows], at least 1, this token included (its k and v are in the cache already). Query
    head i reads KV head `(i + q_offset) // q_per_kv`. Returns a new [num_rows, num_q_heads,
    head_dim]. What lies in the cache past a row's length never matters, NaN included.
    """
    num_rows, num_q_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    max_len = int(lens.max())
    blocks = block_table.index_select(0, slots)[:, : -(-max_len // block_size)].flatten()
    # index_select copies whole blocks, several times faster than indexing with a tensor.
    k = k_cache.index_select(0, blocks).flatten(0, 1)
    v = v_cache.index_select(0, blocks).flatten(0, 1)
    mask = None
    if num_rows == 1:
        k, v = k[:max_len], v[:max_len]
    else:
        mask = _clear_beyond(k, v, lens)
    # The query heads of a group stand in the place of query positions: no copy of k and v per head.
    shape = (num_rows, k.shape[0] // num_rows, num_kv_heads, head_dim)
    out = functional.scaled_dot_product_attention(
        group_queries(q, num_kv_heads, q_per_kv, q_offset),
        k.view(shape).transpose(1, 2),
        v.view(shape).transpose(1, 2),
        attn_mask=mask,
        scale=scale,
    )
    return ungroup_queries(out, num_q_heads, q_offset)


def _clear_beyond(k: Tensor, v: Tensor, lens: Tensor) -> Tensor:
    """Zero k and v past each row's length, where they may be NaN; the mask that hides them.

    k and v [num_rows * context, num_kv_heads, head_dim]; returns [num_rows, 1, 1, context].
    """
    context = k.shape[0] // lens.shape[0]
    beyond = torch.arange(context, device=lens.device) >= lens[:, None]
    beyond_tokens = beyond.flatten().nonzero().squeeze(1)
    k.index_fill_(0, beyond_tokens, 0.0)
    v.index_fill_(0, beyond_tokens, 0.0)
    mask = torch.zeros(beyond.shape, dtype=k.dtype, device=k.device)
    return mask.masked_fill_(beyond, float("-inf"))[:, None, None]


@jit(unaligned=("slots_ptr", "lens_ptr"))
def _decode_attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,
    slots_ptr,
    lens_ptr,
    out_ptr,
    log_sum_ptr,
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
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    after_previous()
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lens_ptr + row)
    split_tokens = tl.cdiv(tl.cdiv(length, TILE_TOKENS), NUM_SPLITS) * TILE_TOKENS
    first = split * split_tokens
    end = tl.minimum(first + split_tokens, length)

    members = tl.arange(0, BLOCK_GROUP)
    heads = kv_head * Q_PER_KV - Q_OFFSET + members
    is_ours = (members < Q_PER_KV) & (heads >= 0) & (heads < NUM_Q_HEADS)
    parts = (row * NUM_Q_HEADS + heads) * NUM_SPLITS + split
    if first >= end:
        if NUM_SPLITS > 1:
            tl.store(log_sum_ptr + parts, float("-inf"), mask=is_ours)
    else:
        dims = tl.arange(0, BLOCK_DIM)
        stored = is_ours[:, None] & (dims < HEAD_DIM)[None, :]
        q_rows = q_ptr + row * q_stride + heads[:, None] * HEAD_DIM
        q = tl.load(q_rows + dims[None, :], mask=stored, other=0.0)
        slot = tl.load(slots_ptr + row)
        blocks_ptr = block_table_ptr + slot * table_stride
        query_positions = tl.zeros([BLOCK_GROUP], tl.int32) + (length - 1)
        k_head_ptr = k_cache_ptr + kv_head.to(tl.int64) * k_head_stride
        v_head_ptr = v_cache_ptr + kv_head.to(tl.int64) * v_head_stride
        whole_end = first + (end - first) // TILE_TOKENS * TILE_TOKENS
        out, log_sum = attend(
            q,
            query_positions,
            k_head_ptr,
            v_head_ptr,
            blocks_ptr,
            first,
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
        tl.store(out_ptr + parts[:, None] * HEAD_DIM + dims[None, :], out, mask=stored)
        if NUM_SPLITS > 1:
            tl.store(log_sum_ptr + parts, log_sum, mask=is_ours)


@jit()
def _join_splits_kernel(
    parts_ptr,
    log_sum_ptr,
    out_ptr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """Weigh the parts of one row and head by their share of the softmax; empty ones have none."""
    after_previous()
    row_and_head = tl.program_id(0).to(tl.int64)
    splits = row_and_head * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    dims = tl.arange(0, BLOCK_DIM)
    in_head = dims < HEAD_DIM
    log_sum = tl.load(log_sum_ptr + splits)
    used = log_sum != float("-inf")
    parts = tl.load(
        parts_ptr + splits[:, None] * HEAD_DIM + dims[None, :],
        mask=used[:, None] & in_head[None, :],
        other=0.0,
    )
    share = tl.exp2(log_sum - tl.max(log_sum, axis=0))
    out = tl.sum(parts * share[:, None], axis=0) / tl.sum(share, axis=0)
    out_row = out_ptr + row_and_head * HEAD_DIM + dims
    tl.store(out_row, out.to(out_ptr.dtype.element_ty), mask=in_head)


def choose_num_splits(num_rows: int, num_kv_heads: int, max_context: int, num_sms: int) -> int:
    """How many programs share the context of one row and KV head; a power of two.

    Enough to fill the GPU, and never more than the longest context has tiles. Depends on nothing
    that changes between replays of a graph, so the order of summation is fixed per launch shape.
    """
    wanted = -(-_PROGRAMS_PER_SM * num_sms // (num_rows * num_kv_heads))
    most = -(-max_context // _MIN_SPLIT_TOKENS)
    return min(next_power_of_2(max(wanted, 1)), next_power_of_2(max(most, 1)), _MAX_SPLITS)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    lens: Tensor,
    scale: float,
    q_per_kv: int,
    q_offset: int,
    num_splits: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """`decode_attention_reference` as one kernel, or two where the context is split.

    num_splits, a power of two, overrides `choose_num_splits`, and `tile` `choose_tile`. The parts
    of a split context are float32 scratch [num_rows, num_q_heads, num_splits, head_dim] from
    torch's allocator: part of the graph's pool where the call is captured.
    """
    num_rows, num_q_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == head_dim, k_cache.shape
    assert k_cache.stride(3) == v_cache.stride(3) == block_table.stride(1) == 1, k_cache.stride()
    assert q.stride(2) == 1 and q.stride(1) == head_dim, q.stride()
    assert q_offset >= 0 and q_offset + num_q_heads <= num_kv_heads * q_per_kv
    assert block_table.dtype == lens.dtype == torch.int32 and slots.dtype == torch.int64
    num_splits = num_splits or choose_num_splits(
        num_rows, num_kv_heads, block_table.shape[1] * block_size, _num_sms(q.device)
    )
    out = torch.empty((num_rows, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    parts, log_sum = out, None
    if num_splits > 1:
        shape = (num_rows, num_q_heads, num_splits)
        parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        log_sum = torch.empty(shape, dtype=torch.float32, device=q.device)
    block_dim = padded_head_dim(head_dim)
    tile = tile or choose_tile(block_dim, q.element_size(), num_splits)
    _decode_attention_kernel[(num_rows, num_kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        block_table,
        slots,
        lens,
        parts,
        log_sum,
        scale * LOG2_E,
        q.stride(0),
        block_table.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_Q_HEADS=num_q_heads,
        Q_PER_KV=q_per_kv,
        Q_OFFSET=q_offset,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_GROUP=max(16, next_power_of_2(q_per_kv)),
        BLOCK_SIZE=block_size,
        TILE_TOKENS=tile.num_tokens,
        NUM_SPLITS=num_splits,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **early_launch(),
    )
    if log_sum is not None:
        _join_splits_kernel[(num_rows * num_q_heads,)](
            parts,
            log_sum,
            out,
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            NUM_SPLITS=num_splits,
            num_warps=4,
            **early_launch(),
        )
    return out


def _num_sms(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1  # Triton's interpreter runs one program at a time


def choose_tile(block_dim: int, element_size: int, num_splits: int) -> Tile:
    """16 KiB of keys a tile, half of that in float32, whose products take registers instead.

    Where the context is split so often that a program has but a tile or two, half of it: on an
    H100 5.5 us instead of 6.7 for one row of 248 tokens, 18.9 instead of 20.2 for 8,192.
    """
    tile_bytes = 8192 if element_size == 4 else 16384
    is_short = num_splits >= _MANY_SPLITS
    num_tokens = min(tile_bytes // (block_dim * element_size), 64) // (2 if is_short else 1)
    return Tile(max(num_tokens, 16), num_stages=2 if is_short else 3)
