"""Which products of a model go to which kernel, as a value that never changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.kernels.linear import linear
from worker.kernels.linear_tile import ROW_BUCKETS, LinearTile
from worker.kernels.silu_mul import silu_mul
from worker.kernels.small_linear import small_linear


@dataclass(frozen=True)
class LinearCase:
    """Products that share a choice: weight [out_size, in_size], x of at most `num_rows` rows."""

    num_rows: int
    out_size: int
    in_size: int
    dtype: torch.dtype
    is_gated: bool = False


@dataclass(frozen=True)
class LinearTable:
    """`linear` and `gated_linear` of `Ops`, by the fastest kernel for each case.

    A case that `tiles` lacks goes to the vendor's kernel.
    """

    tiles: Mapping[LinearCase, LinearTile]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `worker.kernels.linear.linear`, up to rounding."""
        tile = self._tile(x, weight, is_gated=False)
        if tile is None:
            return linear(x, weight, bias)
        return small_linear(x, weight, bias, tile)

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `worker.kernels.linear.gated_linear`, up to rounding."""
        tile = self._tile(x, weight, is_gated=True)
        if tile is None:
            return silu_mul(self.linear(x, weight, bias))
        return small_linear(x, weight, bias, tile, is_gated=True)

    def _tile(self, x: Tensor, weight: Tensor, is_gated: bool) -> LinearTile | None:
        bucket = row_bucket(x.shape[0])
        if bucket is None:
            return None
        out_size, in_size = weight.shape
        return self.tiles.get(LinearCase(bucket, out_size, in_size, x.dtype, is_gated))


def row_bucket(num_rows: int) -> int | None:
    """The number of rows that was measured for `num_rows` rows; None above all of them."""
    return next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), None)
