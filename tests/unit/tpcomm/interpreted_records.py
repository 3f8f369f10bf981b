"""What the staging kernels leave in the ring, under Triton's interpreter; by test_records.py.

Argument: world size.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Sequence

import torch

from tests.unit.tpcomm.virtual_ranks import (
    clock_of_the_host,
    fresh_memory,
    interpreted_tables,
    run_virtual_ranks,
)
from tpcomm import ReduceOp
from tpcomm.allreduce_kernels import one_shot_all_reduce, two_shot_all_reduce
from tpcomm.gather_kernel import small_all_gather
from tpcomm.norm_kernel import all_reduce_add_rms_norm
from tpcomm.record_kernels import begin_stamp, end_stamp
from tpcomm.records import SEQUENCE_WRAP, CollectiveRecord, unpack_ring
from tpcomm.staging_tables import StagingTables

LATE_S = 0.3
LIMIT_S = 20.0


def recorded(tables: StagingTables) -> Sequence[CollectiveRecord]:
    return unpack_ring(tables.ring.tolist(), 0).calls


def expect(tables: StagingTables, calls: list[tuple[int, str, str, int]]) -> None:
    records = recorded(tables)[-len(calls) :]
    assert [(r.sequence, r.operation, r.path, r.num_bytes) for r in records] == calls, records
    assert all(r.ended_ns >= r.begun_ns > 0 for r in records), records


def every_kernel_is_recorded(tables: StagingTables) -> None:
    """By its sequence, operation, path and bytes; NCCL's calls in the same order."""
    x, weight = torch.ones(3, 100), torch.ones(100)
    one_shot_all_reduce(torch.ones(700), ReduceOp.SUM, tables)
    one_shot_all_reduce(torch.ones(700).half(), ReduceOp.MAX, tables)
    one_shot_all_reduce(torch.ones(5, dtype=torch.int32), ReduceOp.SUM, tables)
    one_shot_all_reduce(torch.ones(5, dtype=torch.int64), ReduceOp.MAX, tables)
    two_shot_all_reduce(torch.ones(400), ReduceOp.SUM, tables)
    small_all_gather(x[0], torch.ones(tables.world_size, 100), tables)
    nccl_call(tables, "broadcast", 3 << 30)
    all_reduce_add_rms_norm(x, torch.ones(3, 100), weight, 1e-5, tables)
    expect(
        tables,
        [
            (0, "all_reduce", "one_shot", 2800),
            (1, "all_reduce_max", "one_shot", 1400),
            (2, "all_reduce", "one_shot", 20),
            (3, "all_reduce_max", "one_shot", 40),
            (4, "all_reduce", "two_shot", 1600),
            (5, "all_gather", "staged", 400),
            (6, "broadcast", "nccl", 3 << 30),
            (9, "all_reduce_add_rms_norm", "fused", 1200),
        ],
    )
    waits = sum(call.ended_ns - call.begun_ns for call in recorded(tables))
    assert tables.ring[-1].tolist() == [8, waits, 0, 0]


def nccl_call(tables: StagingTables, operation: str, num_bytes: int) -> None:
    begin_stamp(tables.state, tables.ring, operation, num_bytes).run()
    assert recorded(tables)[-1].ended_ns == 0
    end_stamp(tables.state, tables.ring).run()


def sums_are_right_where_sequences_wrap(tables: StagingTables) -> None:
    """With NCCL's calls between, which count but must not change which buffer is next."""
    factor = tables.world_size
    tables.state.copy_((SEQUENCE_WRAP - 2 << 32) | (tables.state & 0xFFFFFFFF))
    for step in range(6):
        value = torch.full((200,), float(step))
        one_shot_all_reduce(value, ReduceOp.SUM, tables)
        assert torch.equal(value, torch.full((200,), float(step * factor))), step
        if step % 2:
            nccl_call(tables, "all_reduce", 8)
    last = [r.sequence for r in recorded(tables)[-9:]]
    assert last == [SEQUENCE_WRAP - 2, SEQUENCE_WRAP - 1, 0, 3, 4, 5, 8, 9, 10], last


def nothing_is_recorded_when_switched_off(tables: StagingTables) -> None:
    before = tables.ring.clone()
    silent = dataclasses.replace(tables, is_recording=False)
    one_shot_all_reduce(torch.ones(40), ReduceOp.SUM, silent)
    assert torch.equal(tables.ring, before)


def the_late_rank_waits_least(tables: StagingTables) -> None:
    late = tables.world_size - 1
    if tables.rank == late:
        time.sleep(LATE_S)  # load for the test, not synchronisation
    one_shot_all_reduce(torch.ones(40), ReduceOp.SUM, tables)
    last = recorded(tables)[-1]
    wait = torch.tensor([last.ended_ns - last.begun_ns])
    waits = small_all_gather(wait, torch.zeros(tables.world_size, 1).long(), tables)
    assert int(waits.argmin()) == late, waits


def body(tables: StagingTables) -> None:
    every_kernel_is_recorded(tables)
    nothing_is_recorded_when_switched_off(tables)
    the_late_rank_waits_least(tables)


def wrapping(tables: StagingTables) -> None:
    sums_are_right_where_sequences_wrap(tables)


def a_call_that_waits_has_no_end() -> None:
    tables = interpreted_tables(fresh_memory(2), 0, 2)
    thread = threading.Thread(
        target=lambda: one_shot_all_reduce(torch.ones(8), ReduceOp.SUM, tables)
    )
    thread.start()
    deadline = time.monotonic() + LIMIT_S
    while not recorded(tables) and time.monotonic() < deadline:
        time.sleep(0.01)
    (record,) = recorded(tables)
    assert record.ended_ns == 0 and record.num_bytes == 32, record
    tables.abort_word.fill_(1)
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def main() -> None:
    world_size = int(sys.argv[1])
    run_virtual_ranks(body, world_size)
    run_virtual_ranks(wrapping, world_size)
    clock_of_the_host()
    a_call_that_waits_has_no_end()


if __name__ == "__main__":
    main()
