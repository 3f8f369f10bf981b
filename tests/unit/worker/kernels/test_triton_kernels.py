"""The Triton kernels without a GPU: under the interpreter, and compiled for sm_90."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.triton_programs import needs_triton, run_program

HERE = "tests.unit.worker.kernels"
SHARED_BYTES_PER_BLOCK = 232_448  # CUDA C++ Programming Guide, compute capability 9.0


@needs_triton
def test_every_kernel_equals_its_reference_under_the_interpreter() -> None:
    run_program(f"{HERE}.interpreted_sweep", TRITON_INTERPRET="1")


@needs_triton
def test_every_kernel_compiles_for_hopper_within_its_limits(tmp_path: Path) -> None:
    output = run_program(
        f"{HERE}.compile_sm90", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0"
    )
    reports = [json.loads(line) for line in output.splitlines()]
    assert {report["kernel"] for report in reports} == {
        "_rms_norm_kernel",
        "_silu_mul_kernel",
        "_embedding_kernel",
        "_qk_norm_rope_store_kernel",
        "_decode_attention_kernel",
        "_join_splits_kernel",
        "_one_row_linear_kernel",
        "_few_rows_linear_kernel",
        "_prefill_attention_kernel",
        "_row_inputs_kernel",
        "_advance_best_kernel",
    }
    for report in reports:
        assert report["cubin_bytes"] > 0
        assert report["shared_bytes"] <= SHARED_BYTES_PER_BLOCK, report
        assert not report["tf32"], report
        # The products ask for weights, which no kernel writes, before they wait.
        assert report["waits_for_previous"] or report["kernel"] == "_one_row_linear_kernel", report
        if report["kernel"].endswith(("attention_kernel", "few_rows_linear_kernel")):
            assert report["tensor_core"] == (report["dtype"] != "torch.float32"), report
