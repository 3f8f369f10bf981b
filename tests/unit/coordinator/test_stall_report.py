"""The report on a stall: who is behind, in which collective, since when."""

from __future__ import annotations

import tpcomm
from coordinator.stall_report import SEQUENCE_WRAP, RankRecord, report_stall
from protos.lockstep.v1.worker_pb2 import CollectiveRecord
from tpcomm import records
from worker.record_message import recorded_message

SECOND = 1_000_000_000
NOW = 100 * SECOND


def call(
    sequence: int,
    operation: str = "all_reduce",
    path: str = "one_shot",
    byte_count: int = 8192,
    begun_nanos: int = 90 * SECOND,
    ended_nanos: int = 0,
) -> CollectiveRecord:
    return CollectiveRecord(
        sequence=sequence,
        operation=operation,
        path=path,
        byte_count=byte_count,
        begun_nanos=begun_nanos,
        ended_nanos=ended_nanos,
    )


def calls(*given: CollectiveRecord) -> RankRecord:
    return RankRecord(given, NOW)


def ended(sequence: int, operation: str = "all_reduce", path: str = "one_shot") -> CollectiveRecord:
    return call(sequence, operation, path, ended_nanos=91 * SECOND)


def test_rank_that_never_arrived_is_named_with_the_call_and_its_last() -> None:
    found = report_stall([calls(ended(6), call(7, byte_count=16384)), calls(ended(6))])
    assert found.behind == [1]
    assert found.line == (
        "rank 1 has not issued call 7, all_reduce of 16384 bytes by one_shot, in which rank 0 "
        "waits, for 10.0 s; its last is call 6, all_reduce of 8192 bytes by one_shot, ended 9.0 s "
        "ago"
    )
    assert found.table == [
        "rank 0: call 7, all_reduce of 16384 bytes by one_shot, waiting for 10.0 s",
        "rank 1: call 6, all_reduce of 8192 bytes by one_shot, ended 9.0 s ago",
    ]


def test_rank_that_waits_in_an_earlier_call_is_behind() -> None:
    found = report_stall([calls(ended(6), call(7)), calls(call(6)), calls(ended(6), call(7))])
    assert found.behind == [1]
    assert "in which ranks 0, 2 wait, for 10.0 s" in found.line
    assert found.line.endswith("waiting for 10.0 s")


def test_rank_that_recorded_nothing_is_behind() -> None:
    found = report_stall([calls(call(0)), calls()])
    assert found.behind == [1] and found.line.endswith("; it has recorded none")
    assert found.table[1] == "rank 1: nothing recorded"


def test_rank_without_record_is_named_with_why_and_who_waits() -> None:
    found = report_stall([calls(call(7)), RankRecord(absent="DEADLINE_EXCEEDED")])
    assert found.behind == [1]
    assert found.line == (
        "rank 1 gave no record (DEADLINE_EXCEEDED); rank 0 waits in call 7, all_reduce of 8192 "
        "bytes by one_shot, for 10.0 s"
    )
    idle = report_stall([calls(ended(7)), RankRecord(absent="gone")])
    assert idle.line.endswith("no other rank waits in a collective")


def test_all_ranks_in_one_call_point_at_a_link_or_a_kernel() -> None:
    found = report_stall([calls(call(7)), calls(call(7, begun_nanos=95 * SECOND))])
    assert found.behind == ()
    assert found.line.startswith("all ranks wait in call 7, all_reduce of 8192 bytes by one_shot,")
    assert "for 10.0 s: each has sent its part, so a link or a kernel is at fault" in found.line


def test_rank_that_waits_where_the_others_are_done_did_not_get_what_was_sent() -> None:
    found = report_stall([calls(ended(7)), calls(call(7))])
    assert found.behind == [1]
    assert "rank 1 waits in call 7" in found.line
    assert "which rank 0 has completed: what was sent did not arrive" in found.line


def test_calls_that_differ_at_one_sequence_are_a_bug_and_the_first_is_named() -> None:
    gathers = [ended(sequence, "all_gather", "staged") for sequence in (6, 7)]
    found = report_stall([calls(ended(5), ended(6), call(7)), calls(ended(5), *gathers)])
    assert found.line == (
        "ranks issued different collectives as call 6, which is a bug: rank 0 all_reduce of 8192 "
        "bytes by one_shot, rank 1 all_gather of 8192 bytes by staged"
    )


def test_no_collective_at_fault_is_said_too() -> None:
    idle = report_stall([calls(ended(7)), calls(ended(7))])
    assert idle.line.startswith("no rank waits in a collective; the last was call 7")
    assert report_stall([calls(), calls()]).line == "no collective is recorded on any rank"


def test_sequences_that_have_wrapped_are_ahead_of_those_that_have_not() -> None:
    found = report_stall([calls(call(0)), calls(ended(SEQUENCE_WRAP - 1))])
    assert found.behind == [1] and "not issued call 0" in found.line


def test_sequences_and_records_are_those_of_tpcomm() -> None:
    assert SEQUENCE_WRAP == records.SEQUENCE_WRAP
    own = tpcomm.CollectiveRecord(3, "barrier", "shm", 0, 5 * SECOND, 0)
    message = recorded_message(tpcomm.Recorded([own]))
    assert report_stall([RankRecord(message.collectives, NOW)] * 2).line.startswith(
        "all ranks wait in call 3"
    )
