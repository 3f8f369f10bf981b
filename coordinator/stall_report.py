"""Which rank is behind, and in which collective, from what every rank recorded of its last ones.

Ranks issue the same collectives in the same order, so calls are matched by their sequence. A rank
whose last call has begun and not ended waits there; a rank whose last call is an earlier one is
what it waits for. Times are of each rank's own clock and never compared between ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protos.lockstep.v1.worker_pb2 import CollectiveRecord

_NUM_SHOWN = 8
SEQUENCE_WRAP = 3 << 29  # tpcomm's: sequences begin anew there


@dataclass(frozen=True)
class RankRecord:
    """What one rank gave: its calls in the order they began, and its clock when it read them.

    absent: why it gave nothing; the rest is unused then.
    """

    calls: Sequence[CollectiveRecord] = ()
    now_ns: int = 0
    absent: str = ""


@dataclass(frozen=True)
class StallReport:
    """What the records say.

    line: for logs and errors. table: a line a rank. behind: the ranks that others wait for.
    is_stall: some rank waits in a collective, or they differ; else the fault is elsewhere.
    """

    line: str
    table: Sequence[str]
    behind: Sequence[int]
    is_stall: bool


def report_stall(records: Sequence[RankRecord]) -> StallReport:
    """Of all ranks' records, in rank order."""
    last = {rank: record.calls[-1] for rank, record in enumerate(records) if record.calls}
    table = [_table_line(rank, record) for rank, record in enumerate(records)]
    is_waiting = any(not call.ended_nanos for call in last.values())
    differing = _first_difference(records)
    line, behind = (differing, ()) if differing else _find(records, last)
    return StallReport(line, table, behind, is_waiting or bool(differing))


def last_calls(records: Sequence[RankRecord]) -> list[str]:
    """The last calls of every rank, a line each, for who looks into it later."""
    return [
        f"rank {rank}: {_name(call)}, {_state(call, record.now_ns)}"
        for rank, record in enumerate(records)
        for call in record.calls[-_NUM_SHOWN:]
    ]


def steps_ahead(sequence: int, other: int) -> int:
    """How far `sequence` is ahead of `other`; negative if it is behind."""
    half = SEQUENCE_WRAP // 2
    return (sequence - other + half) % SEQUENCE_WRAP - half


def _find(
    records: Sequence[RankRecord], last: Mapping[int, CollectiveRecord]
) -> tuple[str, Sequence[int]]:
    silent = [rank for rank, record in enumerate(records) if record.absent]
    waiting = [rank for rank, call in last.items() if not call.ended_nanos]
    if silent:
        return _silent_ranks(records, last, silent, waiting), silent
    if not last:
        return "no collective is recorded on any rank", ()
    if not waiting:
        first = min(last)
        state = _state(last[first], records[first].now_ns)
        return f"no rank waits in a collective; the last was {_name(last[first])}, {state}", ()
    front = _furthest([last[rank] for rank in waiting])
    behind = [
        rank
        for rank in range(len(records))
        if rank not in last or steps_ahead(last[rank].sequence, front.sequence) < 0
    ]
    if behind:
        return _late_ranks(records, last, front, behind, waiting), behind
    done = [rank for rank in last if rank not in waiting]
    where = _name(front)
    since = _waited(records, last, waiting)
    if done:
        return (
            f"{_ranks(waiting)} {_verb(waiting, 'waits', 'wait')} in {where}, for {since}, which "
            f"{_ranks(done)} {_verb(done, 'has', 'have')} completed: what was sent did not arrive",
            waiting,
        )
    return (
        f"all ranks wait in {where}, for {since}: each has sent its part, so a link or a kernel "
        "is at fault",
        (),
    )


def _first_difference(records: Sequence[RankRecord]) -> str:
    """The earliest call that ranks issued differently, which is a bug; empty if there is none."""
    issued: dict[int, tuple[int, CollectiveRecord]] = {}
    differing: list[tuple[CollectiveRecord, str]] = []
    for rank, record in enumerate(records):
        for call in record.calls:
            first_rank, first = issued.setdefault(call.sequence, (rank, call))
            if _what(first) != _what(call):
                text = f"rank {first_rank} {_what(first)}, rank {rank} {_what(call)}"
                differing.append((call, text))
    if not differing:
        return ""
    start = differing[0][0].sequence
    call, text = min(differing, key=lambda entry: steps_ahead(entry[0].sequence, start))
    return f"ranks issued different collectives as call {call.sequence}, which is a bug: {text}"


def _silent_ranks(
    records: Sequence[RankRecord],
    last: Mapping[int, CollectiveRecord],
    silent: Sequence[int],
    waiting: Sequence[int],
) -> str:
    text = f"{_ranks(silent)} gave no record ({records[silent[0]].absent})"
    if not waiting:
        return f"{text}; no other rank waits in a collective"
    who = f"{_ranks(waiting)} {_verb(waiting, 'waits', 'wait')}"
    where = _name(_furthest([last[rank] for rank in waiting]))
    return f"{text}; {who} in {where}, for {_waited(records, last, waiting)}"


def _late_ranks(
    records: Sequence[RankRecord],
    last: Mapping[int, CollectiveRecord],
    front: CollectiveRecord,
    behind: Sequence[int],
    waiting: Sequence[int],
) -> str:
    ahead = [rank for rank in waiting if rank not in behind]
    text = (
        f"{_ranks(behind)} {_verb(behind, 'has', 'have')} not issued {_name(front)}, in which "
        f"{_ranks(ahead)} {_verb(ahead, 'waits', 'wait')}, for {_waited(records, last, ahead)}"
    )
    if behind[0] not in last:
        return f"{text}; it has recorded none"
    before = last[behind[0]]
    return f"{text}; its last is {_name(before)}, {_state(before, records[behind[0]].now_ns)}"


def _furthest(calls: Sequence[CollectiveRecord]) -> CollectiveRecord:
    start = calls[0].sequence
    return max(calls, key=lambda call: steps_ahead(call.sequence, start))


def _waited(
    records: Sequence[RankRecord], last: Mapping[int, CollectiveRecord], ranks: Sequence[int]
) -> str:
    longest = max(records[rank].now_ns - last[rank].begun_nanos for rank in ranks)
    return f"{longest / 1e9:.1f} s"


def _state(call: CollectiveRecord, now_ns: int) -> str:
    if call.ended_nanos:
        return f"ended {(now_ns - call.ended_nanos) / 1e9:.1f} s ago"
    return f"waiting for {(now_ns - call.begun_nanos) / 1e9:.1f} s"


def _what(call: CollectiveRecord) -> str:
    return f"{call.operation} of {call.byte_count} bytes by {call.path}"


def _name(call: CollectiveRecord) -> str:
    return f"call {call.sequence}, {_what(call)}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _verb(ranks: Sequence[int], one: str, more: str) -> str:
    return more if len(ranks) > 1 else one


def _table_line(rank: int, record: RankRecord) -> str:
    if record.absent:
        return f"rank {rank}: no record: {record.absent}"
    if not record.calls:
        return f"rank {rank}: nothing recorded"
    call = record.calls[-1]
    return f"rank {rank}: {_name(call)}, {_state(call, record.now_ns)}"
