"""The one-shot kernel without a GPU: virtual ranks under the interpreter, and sm_90 code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit.tpcomm.triton_programs import needs_triton, run_program
from tpcomm import ReduceOp
from tpcomm.allreduce_kernels import StagingTables, one_shot_all_reduce


@needs_triton
def test_virtual_ranks_get_the_reference_sum_and_an_abort_ends_the_wait() -> None:
    run_program("interpreted_all_reduce", "3", TRITON_INTERPRET="1")


@needs_triton
def test_every_variant_compiles_for_hopper_with_system_scope_flags(tmp_path: Path) -> None:
    output = run_program(
        "compile_all_reduce_sm90", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0"
    )
    reports = [json.loads(line) for line in output.splitlines()]
    assert len(reports) == 5 * 2 * 2
    for report in reports:
        instructions = report["instructions"]
        assert report["cubin_bytes"] > 0
        assert "atom.global.sys.release.exch.b64" in instructions
        assert any(name.startswith("ld.global.sys.acquire") for name in instructions)
        moves_vectors = {"ld.global.v4.b32", "ld.global.v2.b64"} & set(instructions)
        assert bool(moves_vectors) == report["whole_vectors"], report
        assert not {"ld.global.b16", "st.global.b16"} & set(instructions) or (
            not report["whole_vectors"]
        )


def test_message_larger_than_a_slot_is_our_bug() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    tables = StagingTables(one, one, one, rank=0, slots_offset=0, slot_bytes=8)
    with pytest.raises(AssertionError):
        one_shot_all_reduce(torch.zeros(3), ReduceOp.SUM, tables)
