"""The dense layer by the vendor's GEMM, through torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from worker.kernels.silu_mul import silu_mul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [num_tokens, in_size] times weight [out_size, in_size] transposed, plus bias [out_size].

    Float32 is exact to rounding only while the caller keeps TF32 off.
    """
    return functional.linear(x, weight, bias)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of `linear`: [num_tokens, out_size / 2]."""
    return silu_mul(linear(x, weight, bias))
