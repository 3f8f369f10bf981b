# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The dense layer for a few rows on tensor cores.

The weights are the first operand of the product, so that a tile is BLOCK_N rows of them and the few
rows of x are its narrow side. With several groups each group of warps has a part of the inner
dimension, as one product of a batch; their sums are added in one order, so results repeat bit for
bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcomm.triton_language import after_previous, early_launch
from worker.kernels.linear_tile import LinearTile
from worker.kernels.triton_language import jit, tl
from worker.kernels.weight_tiles import load_weights


@jit(varying=("num_rows",))
def _few_rows_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATED: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one; what they give is not stored.
    weight_rows = weight_ptr + tl.minimum(columns, N - 1).to(tl.int64) * K
    x_rows = x_ptr + rows * K
    if NUM_GROUPS == 1:
        ks = tl.arange(0, BLOCK_K)
        weight_ks, x_ks, is_row = ks[None, :], ks[:, None], (rows < num_rows)[None, :]
        weights, x_tile = weight_rows[:, None] + weight_ks, x_rows[None, :] + x_ks
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        ks = tl.arange(0, NUM_GROUPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        weight_ks, x_ks, is_row = ks[:, None, :], ks[:, :, None], (rows < num_rows)[None, None, :]
        weights, x_tile = weight_rows[None, :, None] + weight_ks, x_rows[None, None, :] + x_ks
        sums = tl.zeros((NUM_GROUPS, BLOCK_N, BLOCK_M), tl.float32)
    up_sums = sums
    to_up = N.to(tl.int64) * K
    after_previous()
    for k in range(0, K, NUM_GROUPS * BLOCK_K):
        is_x = is_row if EVEN_K else is_row & (x_ks < K - k)
        x = tl.load(x_tile, mask=is_x, other=0.0)
        sums = tl.dot(load_weights(weights, weight_ks, K - k, EVEN_K), x, sums)
        if GATED:
            up = load_weights(weights + to_up, weight_ks, K - k, EVEN_K)
            up_sums = tl.dot(up, x, up_sums)
        weights += NUM_GROUPS * BLOCK_K
        x_tile += NUM_GROUPS * BLOCK_K
    out = sums if NUM_GROUPS == 1 else tl.sum(sums, axis=0)
    inside = columns < N
    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, out = out, up_sums if NUM_GROUPS == 1 else tl.sum(up_sums, axis=0)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + N + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
        out *= gate * tl.sigmoid(gate)
    inside = inside[:, None] & (rows < num_rows)[None, :]
    out_tile = out_ptr + rows[None, :] * N + columns[:, None]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=inside)


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: LinearTile,
    is_gated: bool,
) -> Tensor:
    """`small_linear` of x [up to tile.block_m, in_size]."""
    num_rows, in_size = x.shape
    out_size = weight.shape[0] // (2 if is_gated else 1)
    out = torch.empty((num_rows, out_size), dtype=x.dtype, device=x.device)
    _few_rows_linear_kernel[(-(-out_size // tile.block_n),)](
        x,
        weight,
        bias,
        out,
        num_rows,
        out_size,
        in_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        NUM_GROUPS=tile.num_groups,
        EVEN_K=in_size % (tile.num_groups * tile.block_k) == 0,
        GATED=is_gated,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **early_launch(),
    )
    return out
