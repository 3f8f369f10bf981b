"""Probabilities as integers: sums over shards come out the same in any order of addition."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.sampling.mass_kernel import fixed_mass_kernel

# A mass is exp(l - max) in units of 2**-40; 2**22 of them still fit an int64.
MASS_BITS = 40


def fixed_mass_reference(scaled: Tensor, overall_max: Tensor) -> Tensor:
    """int64 masses of `scaled` float32 [N, C] relative to the row's `overall_max` [N]."""
    shifted = scaled - overall_max[:, None]
    return (shifted.exp_() * 2.0**MASS_BITS).round_().to(torch.int64)


def fixed_mass(scaled: Tensor, overall_max: Tensor) -> Tensor:
    """`fixed_mass_reference`; on CUDA by the kernel code that adds masses up, bit for bit."""
    if scaled.is_cuda:
        return fixed_mass_kernel(scaled, overall_max)
    return fixed_mass_reference(scaled, overall_max)


def nucleus_target(top_p: Tensor, total: Tensor) -> Tensor:
    """int64 [N]: the mass that a nucleus of `top_p` float32 [N] must reach of `total` int64 [N]."""
    target = (top_p.to(torch.float64) * total.to(torch.float64)).ceil().to(torch.int64)
    return torch.minimum(target.clamp(min=1), total)
