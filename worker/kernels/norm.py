# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""RMS normalisation, alone and fused with the residual addition before it.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tpcomm.triton_language import after_previous, early_launch
from worker.kernels.triton_language import jit, next_power_of_2, tl


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, in float32, as `x.dtype`.

    x [num_tokens, hidden_size] (last dim contiguous), weight [hidden_size]; returns a new tensor.
    """
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


@jit()
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    after_previous()
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < HIDDEN
    x = tl.load(x_ptr + row * x_stride + dims, mask=inside, other=0.0)
    if ADD:
        residual_row = residual_ptr + row * residual_stride + dims
        residual = tl.load(residual_row, mask=inside, other=0.0)
        # Rounded before it is squared: later layers see the rounded sum, and so does the reference.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_row, x, mask=inside)
    weight = tl.load(weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    value = x.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(value * value, axis=0) / HIDDEN + eps)
    out = (value * inverse_rms * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HIDDEN + dims, out, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference` as one kernel, one program a row."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`tpcomm.norm_kernel.add_rms_norm_reference` as one kernel, one program a row."""
    assert residual.shape == x.shape and residual.dtype == x.dtype, (residual.shape, x.shape)
    assert residual.stride(1) == 1, residual.stride()
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    num_tokens, hidden_size = x.shape
    assert x.stride(1) == 1, x.stride()
    assert weight.shape == (hidden_size,) and weight.is_contiguous(), weight.shape
    out = torch.empty((num_tokens, hidden_size), dtype=x.dtype, device=x.device)
    block = next_power_of_2(hidden_size)
    _rms_norm_kernel[(num_tokens,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        HIDDEN=hidden_size,
        BLOCK=block,
        ADD=residual is not None,
        num_warps=min(max(block // 512, 1), 16),
        **early_launch(),
    )
    return out
