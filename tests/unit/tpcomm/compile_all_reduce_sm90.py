"""Compiles every variant of the one-shot kernel for Hopper without a GPU.

Started by test_allreduce_kernels.py; a program of its own because it stands in for Triton's
driver. Prints one JSON object a variant: dtype, whether it moves whole vectors, PTX instructions.
"""

from __future__ import annotations

import json
import re

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tpcomm import ReduceOp
from tpcomm.allreduce_kernels import StagingTables, launch_arguments
from tpcomm.communicator import REDUCIBLE_DTYPES

WORLD_SIZE = 4


class HopperDriver:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    driver.set_active(HopperDriver())
    tables = StagingTables(
        bases=torch.zeros(WORLD_SIZE, dtype=torch.int64),
        epochs=torch.zeros(512, dtype=torch.int64),
        abort_word=torch.zeros(1, dtype=torch.int32),
        rank=1,
        slots_offset=16384,
        slot_bytes=4 << 20,
    )
    for dtype in REDUCIBLE_DTYPES:
        for num_elements in (333, 4096):
            for op in ReduceOp:
                tensor = torch.zeros(num_elements, dtype=dtype)
                kernel, arguments = launch_arguments(tensor, op, tables)
                compiled = kernel.warmup(*arguments, num_warps=8, grid=(1,))
                ptx = compiled.asm["ptx"]
                report = {
                    "dtype": str(dtype),
                    "whole_vectors": num_elements == 4096,
                    "cubin_bytes": len(compiled.asm["cubin"]),
                    "instructions": sorted(set(re.findall(r"(?:ld|st|atom)\.global[\w.]*", ptx))),
                }
                print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
