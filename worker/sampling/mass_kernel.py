# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Fixed-point masses and their sums by digit on CUDA, without temporaries of the logits' size.

The references are `fixed_point.fixed_mass_reference` and `threshold.digit_sums_reference`. Both
kernels share the exponential, so that a mass has the same bits in every variant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.kernels.triton_language import jit, tl

_BLOCK = 2048
_NUM_DIGITS = 256


@jit()
def mass_of(shifted):
    """int64 round(exp(shifted) * 2**40) of float32 at most 0."""
    return tl.floor(tl.exp(shifted) * 1099511627776.0 + 0.5).to(tl.int64)


@jit()
def _fixed_mass_kernel(
    scaled_ptr, max_ptr, out_ptr, scaled_stride, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < COUNT
    scaled = tl.load(scaled_ptr + row * scaled_stride + places, mask=inside, other=float("-inf"))
    mass = mass_of(scaled - tl.load(max_ptr + row))
    tl.store(out_ptr + row * COUNT + places, mass, mask=inside)


def fixed_mass_kernel(scaled: Tensor, overall_max: Tensor) -> Tensor:
    """int64 [N, C] masses of `scaled` float32 [N, C] relative to `overall_max` [N]."""
    num_rows, count = scaled.shape
    assert scaled.stride(1) == 1 and overall_max.is_contiguous()
    out = torch.empty(num_rows, count, dtype=torch.int64, device=scaled.device)
    block = 256
    _fixed_mass_kernel[(num_rows, -(-count // block))](
        scaled, overall_max, out, scaled.stride(0), COUNT=count, BLOCK=block, num_warps=4
    )
    return out


@jit()
def _digit_sums_kernel(
    scaled_ptr,
    least_ptr,
    max_ptr,
    prefix_ptr,
    sums_ptr,
    scaled_stride,
    VOCAB: tl.constexpr,
    SHIFT: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < VOCAB
    scaled = tl.load(scaled_ptr + row * scaled_stride + columns, mask=inside, other=float("-inf"))
    active = (scaled >= tl.load(least_ptr + row)) & (scaled > float("-inf"))
    # As ordered_bits.to_ordered with the sign bit flipped; zero has one sign.
    bits = tl.where(scaled == 0.0, 0.0, scaled).to(tl.int32, bitcast=True)
    digits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ -0x80000000
    if SHIFT < 24:
        active = active & (((digits ^ tl.load(prefix_ptr + row)) >> (SHIFT + 8)) == 0)
    digit = (digits >> SHIFT) & 255
    weight = tl.full((BLOCK,), 1, tl.int64)
    if MASS:
        weight = mass_of(tl.where(active, scaled - tl.load(max_ptr + row), float("-inf")))
    # Integer addition: atomics in any order give the same sum.
    counted = active & (weight != 0)
    tl.atomic_add(sums_ptr + row * 256 + digit, weight, mask=counted, sem="relaxed")


def digit_sums_kernel(
    scaled: Tensor, least: Tensor, overall_max: Tensor | None, prefix: Tensor, shift: int
) -> Tensor:
    """`threshold.digit_sums_reference`, with masses as `fixed_mass_kernel` makes them."""
    num_rows, vocab = scaled.shape
    assert scaled.stride(1) == 1
    sums = torch.zeros(num_rows, _NUM_DIGITS, dtype=torch.int64, device=scaled.device)
    _digit_sums_kernel[(num_rows, -(-vocab // _BLOCK))](
        scaled,
        least,
        least if overall_max is None else overall_max,
        prefix,
        sums,
        scaled.stride(0),
        VOCAB=vocab,
        SHIFT=shift,
        MASS=overall_max is not None,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return sums
