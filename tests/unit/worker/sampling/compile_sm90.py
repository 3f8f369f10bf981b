"""Compiles the sampling kernels for Hopper without a GPU; started by test_triton_kernels.py.

Prints one JSON object a launch, as tests/unit/worker/kernels/compile_sm90.py does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime import driver

from tests.unit.worker.kernels.compile_sm90 import CompileOnly, HopperDriver
from worker.sampling import SlotSampling, gumbel_kernel, mask_kernel, mass_kernel, penalty_kernel
from worker.sampling.record import Bounds

KERNELS = (
    (gumbel_kernel, "_shard_best_kernel"),
    (gumbel_kernel, "_combine_kernel"),
    (gumbel_kernel, "_gumbel_at_kernel"),
    (penalty_kernel, "_penalty_kernel"),
    (mask_kernel, "_mask_kernel"),
    (mass_kernel, "_fixed_mass_kernel"),
    (mass_kernel, "_digit_sums_kernel"),
)


def compile_for_shard(vocab: int, vocab_start: int) -> None:
    tables = SlotSampling(9, vocab, vocab_start, torch.device("meta"))
    logits = _empty(torch.float32, 4, vocab)
    slots, row_floats = _empty(torch.int64, 4), _empty(torch.float32, 4)
    for bounds in (None, Bounds(row_floats, row_floats)):
        for all_greedy, with_stats in ((False, False), (True, True), (False, True)):
            gumbel_kernel.gumbel_argmax(
                logits, logits, slots, slots, tables, bounds, all_greedy, with_stats
            )
    gumbel_kernel.gumbel_at(tables.rows(slots).seed, slots, _empty(torch.int64, 4, 64))
    penalty_kernel.apply_penalties_kernel(logits, slots, slots, tables)
    mask_kernel.apply_mask_kernel(logits, slots, tables.choices.masks)
    mass_kernel.fixed_mass_kernel(_empty(torch.float32, 4, 256), row_floats)
    for overall_max in (None, row_floats):
        for shift in (24, 8):
            prefix = _empty(torch.int32, 4)
            mass_kernel.digit_sums_kernel(logits, row_floats, overall_max, prefix, shift)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def main() -> None:
    driver.set_active(HopperDriver())
    for module, name in KERNELS:
        setattr(module, name, CompileOnly(getattr(module, name)))
    compile_for_shard(38016, 37952)
    compile_for_shard(49155, 0)


if __name__ == "__main__":
    main()
