"""The staging kernels without a GPU: virtual ranks under the interpreter, and sm_90 code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit.tpcomm.triton_programs import needs_triton, run_program
from tpcomm import ReduceOp
from tpcomm.allreduce_kernels import one_shot_all_reduce, two_shot_all_reduce
from tpcomm.gather_kernel import small_all_gather
from tpcomm.staging_tables import CHUNK_BYTES, StagingTables, make_tables


@needs_triton
@pytest.mark.parametrize("world_size", ["2", "3", "8"])
def test_virtual_ranks_get_reference_results_and_an_abort_ends_every_wait(world_size: str) -> None:
    run_program("interpreted_kernels", world_size, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("fault", ["unwiped", "early_reuse"])
def test_planted_fault_in_the_protocol_is_seen(fault: str) -> None:
    run_program("interpreted_faults", fault, TRITON_INTERPRET="1")


@needs_triton
def test_every_variant_compiles_for_hopper_with_system_scope_words(tmp_path: Path) -> None:
    output = run_program("compile_sm90", "4", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    reports = [json.loads(line) for line in output.splitlines()]
    assert len(reports) == 5 * 2 * 2 + 3 * 2 * 3 + 2
    for report in reports:
        assert report["cubin_bytes"] > 0
        assert report["waits_for_previous"], report
        if report["kernel"] == "add_rms_norm":
            continue
        instructions = set(report["instructions"])
        # What peers see bypasses the caches, as one vector wherever the message allows it.
        assert report["state_behind_barrier"], report
        # The recorder adds stores and reductions of one thread, and nothing that is waited for.
        atomics = {name for name in instructions if name.startswith("atom")}
        assert atomics == {"atom.global.gpu.relaxed.add.u64"} and not report["fences"]
        sent = {name for name in instructions if name.startswith("st.global.wt")}
        polled = {name for name in instructions if name.startswith("ld.volatile.global")}
        integers = report["dtype"] in ("torch.int32", "torch.int64")
        in_vectors = report["whole_vectors"] and not integers
        assert sent and polled
        assert (sent == {"st.global.wt.v4.b32"}) == in_vectors, report
        assert ("ld.volatile.global.v4.b32" in polled) == in_vectors, report


def _tables() -> StagingTables:
    return make_tables(2, 0, CHUNK_BYTES, torch.device("cpu"))


def test_message_larger_than_a_slot_is_our_bug() -> None:
    too_large = torch.zeros(CHUNK_BYTES // 4 + 1)
    for call in (one_shot_all_reduce, two_shot_all_reduce):
        with pytest.raises(AssertionError):
            call(too_large.repeat(2), ReduceOp.SUM, _tables())
    with pytest.raises(AssertionError):
        small_all_gather(too_large, torch.zeros(2, len(too_large)), _tables())


def test_integers_and_raw_bytes_take_twice_their_size() -> None:
    most = torch.zeros(CHUNK_BYTES // 8, dtype=torch.int32)
    with pytest.raises(AssertionError):
        one_shot_all_reduce(torch.cat([most, most[:1]]), ReduceOp.SUM, _tables())
