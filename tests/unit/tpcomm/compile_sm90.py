"""Compiles the staging kernels for Hopper without a GPU.

Started by test_staging_kernels.py; a program of its own because it stands in for Triton's driver.
Prints one JSON object a variant: kernel, dtype, whether it moves whole vectors, PTX instructions.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.helpers.early_launch import waits_for_previous
from tpcomm import ReduceOp
from tpcomm.allreduce_kernels import one_shot_launch, two_shot_launch
from tpcomm.communicator import REDUCIBLE_DTYPES
from tpcomm.gather_kernel import gather_launch
from tpcomm.norm_kernel import FUSED_DTYPES, fused_launch
from tpcomm.staging_tables import StagingTables, make_tables
from tpcomm.triton_language import Launch

SLOT_BYTES = 4 << 20
Variant = tuple[str, torch.dtype, bool, Launch]


class HopperDriver:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def variants(tables: StagingTables) -> Iterator[Variant]:
    for dtype in REDUCIBLE_DTYPES:
        for num_elements in (333, 4096):
            tensor, whole = torch.zeros(num_elements, dtype=dtype), num_elements == 4096
            for op in ReduceOp:
                yield "one_shot", dtype, whole, one_shot_launch(tensor, op, tables)
            if dtype in FUSED_DTYPES:
                yield "two_shot", dtype, whole, two_shot_launch(tensor, ReduceOp.SUM, tables)
                row = tensor[None]
                launch = fused_launch(row, row, tensor, row, 1e-5, tables)
                yield "fused", dtype, whole, launch
                yield "add_rms_norm", dtype, whole, fused_launch(row, row, tensor, row, 0.1, None)
    for num_elements in (333, 512):
        raw = torch.zeros(num_elements, dtype=torch.uint8)
        out = torch.zeros(tables.world_size, num_elements, dtype=torch.uint8)
        yield "all_gather", torch.uint8, num_elements == 512, gather_launch(raw, out, tables)


def state_behind_barrier(ttir: str) -> bool:
    """Whether the threads of a program meet between reading the state and overwriting it."""
    steps = ("tt.load %state ", "gpu.barrier", "tt.store %state,")
    places = [ttir.find(step) for step in steps]
    return -1 not in places and places == sorted(places)


def main() -> None:
    driver.set_active(HopperDriver())
    tables = make_tables(int(sys.argv[1]), 1, SLOT_BYTES, torch.device("cpu"))
    for name, dtype, whole, launch in variants(tables):
        compiled = launch.compile()
        ptx = compiled.asm["ptx"]
        report = {
            "kernel": name,
            "dtype": str(dtype),
            "whole_vectors": whole,
            "cubin_bytes": len(compiled.asm["cubin"]),
            "shared_bytes": compiled.metadata.shared,
            "state_behind_barrier": state_behind_barrier(compiled.asm["ttir"]),
            "waits_for_previous": waits_for_previous(compiled),
            "fences": len(re.findall(r"\b(?:fence|membar)\.", ptx)),
            "instructions": sorted(set(re.findall(r"(?:ld|st|atom)\.[\w.]*global[\w.]*", ptx))),
        }
        print(json.dumps(report), flush=True)
        if len(sys.argv) > 2 and whole:
            with open(f"{sys.argv[2]}/{name}_{dtype}.cubin", "wb") as file:
                file.write(compiled.asm["cubin"])


if __name__ == "__main__":
    main()
