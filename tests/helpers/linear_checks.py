"""The kernels of the dense layer for few rows against their references, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.kernels.linear_tile import LinearTile
from worker.kernels.small_linear import (
    gated_small_linear_reference,
    small_linear,
    small_linear_reference,
)

# Of the largest results, which are some 5: a rounding to the dtype.
_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
_GARBAGE_ROWS = 3


@dataclass(frozen=True)
class LinearChecks:
    """Every method raises AssertionError on a difference."""

    device: torch.device
    dtype: torch.dtype

    def product(
        self,
        num_rows: int,
        out_size: int,
        in_size: int,
        tile: LinearTile,
        *,
        has_bias: bool = False,
        is_gated: bool = False,
    ) -> None:
        """Equal to the reference, twice in a row to the bit, whatever lies behind x and weight."""
        x = self._guarded(num_rows, in_size, seed=0)
        weight = self._guarded(out_size, in_size, seed=1, scale=in_size**-0.5)
        bias = self._guarded(1, out_size, seed=2)[0] if has_bias else None
        call = (x, weight, bias, tile, is_gated)
        found = small_linear(*call)
        reference = gated_small_linear_reference if is_gated else small_linear_reference
        wanted = reference(x.float().cpu(), weight.float().cpu(), _upcast(bias))
        assert found.dtype == self.dtype
        tolerance = _TOLERANCE[self.dtype]
        torch.testing.assert_close(
            found.float().cpu(), wanted, rtol=tolerance, atol=tolerance, equal_nan=False
        )
        assert torch.equal(small_linear(*call), found)

    def _guarded(self, num_rows: int, num_columns: int, seed: int, scale: float = 1) -> Tensor:
        """Random rows with NaN behind the last one, which no kernel may let in."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(num_rows, num_columns, generator=generator) * scale
        behind = torch.full((_GARBAGE_ROWS, num_columns), torch.nan)
        whole = torch.cat((rows, behind)).to(self.dtype).to(self.device)
        return whole[:num_rows]


def _upcast(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().cpu()
