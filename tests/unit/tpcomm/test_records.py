"""What a rank keeps of its last collectives: in the kernels' ring, and on the host."""

from __future__ import annotations

import pytest

from tests.unit.tpcomm.triton_programs import needs_triton, run_program
from tpcomm.call_log import CallLog
from tpcomm.records import RING_ENTRIES, SEQUENCE_WRAP, pack, unpack_ring
from tpcomm.staging_tables import NUM_BUFFERS


@needs_triton
@pytest.mark.parametrize("world_size", ["2", "3", "8"])
def test_kernels_record_every_call_and_where_they_wait(world_size: str) -> None:
    run_program("interpreted_records", world_size, TRITON_INTERPRET="1")


def test_sequences_wrap_where_buffers_and_ring_begin_anew() -> None:
    assert SEQUENCE_WRAP % NUM_BUFFERS == 0 and SEQUENCE_WRAP % RING_ENTRIES == 0
    assert SEQUENCE_WRAP < 2**31


def test_entries_are_read_in_the_order_they_began_and_empty_ones_left_out() -> None:
    what = pack("all_gather", "staged", 77)
    ring = [[9, what, 500, 700], [0, 0, 0, 0], [8, what, 100, 300], [70, 5_000_000, 0, 0]]
    recorded = unpack_ring(ring, 1000)
    first, second = recorded.calls
    assert (recorded.num_calls, recorded.seconds) == (70, 0.005)
    assert (first.sequence, first.begun_ns, first.ended_ns) == (8, 1100, 1300)
    assert (second.operation, second.path, second.num_bytes) == ("all_gather", "staged", 77)


@pytest.mark.parametrize("ended", [0, 499])
def test_end_of_the_entry_before_is_no_end(ended: int) -> None:
    (record,) = unpack_ring([[9, pack("barrier", "nccl", 0), 500, ended], [0] * 4], 0).calls
    assert record.ended_ns == 0


def test_log_keeps_the_last_calls_and_one_that_failed_stays_without_end() -> None:
    log = CallLog("shm")
    for step in range(RING_ENTRIES + 5):
        log.begin("all_reduce", log.stats.all_reduce, step)
        log.end()
    log.begin("all_gather", log.stats.all_gather, 8)
    recorded = log.recorded()
    records = recorded.calls
    assert (recorded.num_calls, recorded.seconds) == (RING_ENTRIES + 5, log.stats.seconds)
    assert [record.sequence for record in records] == list(range(6, RING_ENTRIES + 7))
    assert [record.sequence for record in records if not record.ended_ns] == [RING_ENTRIES + 6]
    assert log.stats.all_reduce.calls == RING_ENTRIES + 5 and log.stats.seconds
