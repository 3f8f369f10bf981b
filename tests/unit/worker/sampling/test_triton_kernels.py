"""The sampling kernels without a GPU: under Triton's interpreter, and compiled for sm_90."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.triton_programs import needs_triton, run_program

HERE = "tests.unit.worker.sampling"


@needs_triton
def test_every_kernel_equals_its_reference_under_the_interpreter() -> None:
    run_program(f"{HERE}.interpreted_checks", TRITON_INTERPRET="1")


@needs_triton
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    output = run_program(
        f"{HERE}.compile_sm90", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0"
    )
    reports = [json.loads(line) for line in output.splitlines()]
    assert {report["kernel"] for report in reports} == {
        "_shard_best_kernel",
        "_combine_kernel",
        "_gumbel_at_kernel",
        "_penalty_kernel",
        "_mask_kernel",
        "_fixed_mass_kernel",
        "_digit_sums_kernel",
    }
    assert all(report["cubin_bytes"] > 0 for report in reports)
