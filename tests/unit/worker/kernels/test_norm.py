"""The norm references against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tpcomm.norm_kernel import add_rms_norm_reference
from worker.kernels.norm import rms_norm_reference


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
)
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 576), (3, 130), (5, 1)])
def test_rms_norm_is_the_formula_rounded_to_the_input_dtype(
    dtype: torch.dtype, relative: float, num_tokens: int, hidden_size: int
) -> None:
    x, weight = torch.randn(num_tokens, hidden_size).to(dtype), torch.randn(hidden_size).to(dtype)
    normed = rms_norm_reference(x, weight, 1e-5)
    assert normed.dtype == dtype
    wanted = formula(x, weight, 1e-5)
    torch.testing.assert_close(normed.double(), wanted, rtol=relative, atol=relative)


def test_rms_norm_squares_in_float32_where_float16_would_overflow() -> None:
    x, weight = torch.full((1, 64), 3e4, dtype=torch.float16), torch.ones(64, dtype=torch.float16)
    assert torch.equal(rms_norm_reference(x, weight, 1e-5), torch.ones_like(x))


def test_eps_decides_the_norm_of_a_zero_row() -> None:
    assert torch.equal(
        rms_norm_reference(torch.zeros(1, 8), torch.ones(8), 1e-5), torch.zeros(1, 8)
    )


def test_add_rms_norm_leaves_the_rounded_sum_in_the_residual_and_norms_that() -> None:
    x, residual = torch.randn(4, 96).bfloat16(), torch.randn(4, 96).bfloat16()
    weight, untouched = torch.randn(96).bfloat16(), x.clone()
    wanted_sum = (x.float() + residual.float()).bfloat16()
    normed = add_rms_norm_reference(x, residual, weight, 1e-5)
    assert torch.equal(residual, wanted_sum)
    assert torch.equal(x, untouched)
    assert torch.equal(normed, rms_norm_reference(wanted_sum, weight, 1e-5))
