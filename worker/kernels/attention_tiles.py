# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The inner loop that decode and prefill attention share: softmax over tiles of the paged cache.

Source of the running softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax",
2018; of its use in attention: Dao et al., "FlashAttention", 2022.
"""

from __future__ import annotations

from worker.kernels.triton_language import jit, next_power_of_2, tl

LOG2_E = 1.4426950408889634
_MIN_DOT_DIM = 16  # tl.dot takes no shorter dimension


def padded_head_dim(head_dim: int) -> int:
    """The head dimension as a tile holds it."""
    return max(_MIN_DOT_DIM, next_power_of_2(head_dim))


@jit()
def attend(
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
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    """q [rows, BLOCK_DIM] over the cached tokens [first, end) of one sequence and KV head.

    A query sees tokens up to its position in query_positions int32 [rows], and all see [first,
    whole_end), which is whole tiles; every query must see the first tile's first token. blocks_ptr
    is the sequence's row of the block table. Returns float32 [rows, BLOCK_DIM], the attention
    output, and float32 [rows], log2 of the sum of the exponentials behind it.
    """
    rows: tl.constexpr = q.shape[0]
    accumulator = tl.zeros([rows, BLOCK_DIM], tl.float32)
    row_max = tl.full([rows], float("-inf"), tl.float32)
    row_sum = tl.zeros([rows], tl.float32)
    # Twice the same loop: the first, which has most of the work, needs no mask.
    for masked in tl.static_range(2):
        accumulator, row_max, row_sum = _fold_tiles(
            accumulator,
            row_max,
            row_sum,
            q,
            query_positions,
            k_head_ptr,
            v_head_ptr,
            blocks_ptr,
            whole_end if masked else first,
            end if masked else whole_end,
            scale_log2,
            k_block_stride,
            k_token_stride,
            v_block_stride,
            v_token_stride,
            masked == 1,
            HEAD_DIM,
            BLOCK_DIM,
            BLOCK_SIZE,
            TILE_TOKENS,
        )
    return accumulator / row_sum[:, None], row_max + tl.log2(row_sum)


@jit()
def _fold_tiles(
    accumulator,
    row_max,
    row_sum,
    q,
    query_positions,
    k_head_ptr,
    v_head_ptr,
    blocks_ptr,
    first,
    end,
    scale_log2,
    k_block_stride,
    k_token_stride,
    v_block_stride,
    v_token_stride,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    """Fold cached tokens [first, end) into a running softmax, whose scale is in base 2.

    Not MASKED, they are whole tiles that every query sees. MASKED, tokens from `end` on are not
    even read, so that what an unused block holds cannot leak through a product with zero.
    """
    dims = tl.arange(0, BLOCK_DIM)
    in_head = (dims < HEAD_DIM)[None, :]
    for tile in range(first, end, TILE_TOKENS):
        tokens = tile + tl.arange(0, TILE_TOKENS)
        if MASKED:
            readable = tokens < end
            block = tl.load(blocks_ptr + tokens // BLOCK_SIZE, mask=readable, other=0)
            loadable = readable[:, None] & in_head
        else:
            block = tl.load(blocks_ptr + tokens // BLOCK_SIZE)
            loadable = in_head
        block = block.to(tl.int64)
        offset = tokens % BLOCK_SIZE
        k_rows = (block * k_block_stride + offset * k_token_stride)[:, None]
        k = tl.load(k_head_ptr + k_rows + dims[None, :], mask=loadable, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if MASKED:
            seen = tokens[None, :] <= query_positions[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        row_max = new_max
        v_rows = (block * v_block_stride + offset * v_token_stride)[:, None]
        v = tl.load(v_head_ptr + v_rows + dims[None, :], mask=loadable, other=0.0)
        accumulator = tl.dot(
            weights.to(v.dtype), v, accumulator * shrink[:, None], input_precision="ieee"
        )
    return accumulator, row_max, row_sum
