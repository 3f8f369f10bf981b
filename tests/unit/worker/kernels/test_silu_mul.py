"""The gated activation against its formula."""

from __future__ import annotations

import pytest
import torch

from worker.kernels.silu_mul import silu_mul_reference


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)])
def test_gate_is_the_first_half_and_is_the_one_that_is_activated(
    dtype: torch.dtype, relative: float
) -> None:
    gate_up = torch.randn(5, 2 * 70).to(dtype)
    untouched = gate_up.clone()
    gate, up = gate_up.double()[:, :70], gate_up.double()[:, 70:]
    wanted = gate / (1.0 + (-gate).exp()) * up
    found = silu_mul_reference(gate_up)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=relative)
    assert torch.equal(gate_up, untouched)
