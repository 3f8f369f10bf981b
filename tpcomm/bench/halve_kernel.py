# mypy: allow-untyped-defs, allow-incomplete-defs
"""A small kernel as those between the collectives of a step: it takes a result and gives it on."""

from __future__ import annotations

from torch import Tensor

from tpcomm.triton_language import Launch, after_previous, jit, tl

_BLOCK = 1024
_NUM_WARPS = 4


@jit(varying=("x_ptr", "num_elements"))
def tpcomm_bench_halve(x_ptr, num_elements, BLOCK: tl.constexpr):
    after_previous()
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=mask).to(tl.float32)
    tl.store(x_ptr + offsets, (x * 0.5).to(x_ptr.dtype.element_ty), mask=mask)


def halve(x: Tensor) -> None:
    """x (contiguous, any shape) / 2 IN PLACE on the current stream."""
    num_programs = -(-x.numel() // _BLOCK)
    Launch(tpcomm_bench_halve, (x, x.numel(), _BLOCK), num_programs, _NUM_WARPS).run()
