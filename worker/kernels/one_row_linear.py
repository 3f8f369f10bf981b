# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The dense layer for one row: multiply and sum in float32, without tensor cores.

Many small programs that load straight into registers keep more bytes in flight than a pipeline
through shared memory, which has to fill first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcomm.triton_language import after_previous, early_launch
from worker.kernels.linear_tile import LinearTile
from worker.kernels.triton_language import jit, tl
from worker.kernels.weight_tiles import load_weights


@jit()
def _one_row_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATED: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)[None, :]
    # Rows past the end repeat the last one; what they give is not stored.
    weights = weight_ptr + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + ks
    to_up = N.to(tl.int64) * K
    # The first weights, which no earlier kernel writes, are asked for before x may be looked at.
    weight = load_weights(weights, ks, K, EVEN_K).to(tl.float32)
    up = weight
    if GATED:
        up = load_weights(weights + to_up, ks, K, EVEN_K).to(tl.float32)
    after_previous()
    x = tl.load(x_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
    sums = weight * x
    up_sums = up * x
    for k in range(BLOCK_K, K, BLOCK_K):
        weight = load_weights(weights + k, ks, K - k, EVEN_K).to(tl.float32)
        if EVEN_K:
            x = tl.load(x_ptr + k + ks).to(tl.float32)
        else:
            x = tl.load(x_ptr + k + ks, mask=ks < K - k, other=0.0).to(tl.float32)
        sums += weight * x
        if GATED:
            up_sums += load_weights(weights + to_up + k, ks, K - k, EVEN_K).to(tl.float32) * x
    out = tl.sum(sums, axis=1)
    inside = columns < N
    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate, out = out, tl.sum(up_sums, axis=1)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + N + columns, mask=inside, other=0.0).to(tl.float32)
        out *= gate * tl.sigmoid(gate)
    tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def one_row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: LinearTile,
    is_gated: bool,
) -> Tensor:
    """`small_linear` of x [1, in_size]."""
    in_size = x.shape[1]
    out_size = weight.shape[0] // (2 if is_gated else 1)
    out = torch.empty((1, out_size), dtype=x.dtype, device=x.device)
    _one_row_linear_kernel[(-(-out_size // tile.block_n),)](
        x,
        weight,
        bias,
        out,
        out_size,
        in_size,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        EVEN_K=in_size % tile.block_k == 0,
        GATED=is_gated,
        num_warps=tile.num_warps,
        **early_launch(),
    )
    return out
