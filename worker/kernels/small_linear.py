"""The dense layer for few rows, where its time is that of reading the weights once."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from worker.kernels.few_rows_linear import few_rows_linear
from worker.kernels.linear_tile import LinearTile
from worker.kernels.one_row_linear import one_row_linear


def small_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [num_rows, in_size] times weight [out_size, in_size] transposed, plus bias [out_size].

    All contiguous and of one dtype; summed in float32 and rounded once to it.
    """
    return _product(x, weight, bias).to(x.dtype)


def gated_small_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of the product: [num_rows, out_size / 2].

    Gate and up stay in float32, so that there is one rounding, where `gated_linear` rounds both of
    them and then the result.
    """
    gate, up = _product(x, weight, bias).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(x.dtype)


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: LinearTile,
    is_gated: bool = False,
) -> Tensor:
    """One of the references above as one kernel, for float16 and bfloat16; a new tensor.

    At most tile.block_m rows; in_size a multiple of 16. The weights may be read before the kernel
    ahead has ended, so it must not be the one that writes them.
    """
    assert x.is_contiguous() and weight.is_contiguous(), (x.stride(), weight.stride())
    assert x.dtype == weight.dtype and x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert x.shape[0] <= tile.block_m, (x.shape, tile)
    launch = one_row_linear if tile.block_m == 1 else few_rows_linear
    return launch(x, weight, bias, tile, is_gated)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
