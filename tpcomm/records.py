"""The last collectives of a rank: what is kept of each, and how a device packs it.

Every rank keeps the last `RING_ENTRIES` calls and totals of all: GPU kernels write them to a ring
in device memory (record_kernels), CPU backends to a list (call_log). Sequences count the calls of
a group, alike on all ranks, so records of several ranks are matched by them. Clocks are not
compared between ranks: what a rank waited, `ended - begun`, is a difference of one clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpcomm.size_table import (
    ADD_RMS_NORM,
    ALL_GATHER,
    ALL_REDUCE,
    FUSED,
    NCCL,
    ONE_SHOT,
    STAGED,
    TWO_SHOT,
)

ALL_REDUCE_MAX = "all_reduce_max"
BROADCAST = "broadcast"
BARRIER = "barrier"

RING_ENTRIES = 256
ENTRY_WORDS = 4  # sequence, what (packed), begun, ended; totals: calls, nanoseconds; int64 each
# A multiple of the buffers that alternate by sequence (staging_tables), in 31 bits.
SEQUENCE_WRAP = 3 << 29
# Of NCCL's calls: it leaves the buffer that is next where it was.
NCCL_SEQUENCES = 3

_OPERATIONS = ("", ALL_REDUCE, ALL_REDUCE_MAX, ALL_GATHER, ADD_RMS_NORM, BROADCAST, BARRIER)
_PATHS = ("", ONE_SHOT, TWO_SHOT, STAGED, FUSED, NCCL)
_CODE_SHIFT = 40  # below it the bytes


@dataclass(frozen=True)
class CollectiveRecord:
    """One collective as a rank saw it.

    sequence: rises from call to call, by 3 for NCCL's beside staging memory; alike on all ranks.
    num_bytes: of this rank's input.
    begun_ns: when this rank had sent its part, nanoseconds of this host's monotonic clock. On GPUs
        the device's clock is set against that once, so an age drifts by some parts per million.
    ended_ns: when this rank had received what it needs; 0 while it waits, or if the call failed.
    """

    sequence: int
    operation: str
    path: str
    num_bytes: int
    begun_ns: int
    ended_ns: int


@dataclass(frozen=True)
class Recorded:
    """What a rank has recorded.

    calls: the last ones, in the order they began.
    num_calls: that ended since the group was formed.
    seconds: that they took together, from having sent to having received: waits for other ranks
        above all. All ranks issue the same calls, so the rank with the least is the one that others
        wait for.
    """

    calls: Sequence[CollectiveRecord] = ()
    num_calls: int = 0
    seconds: float = 0.0


def pack(operation: str, path: str, num_bytes: int) -> int:
    """Operation, path and bytes in one int64, never 0 and above 32 bits."""
    code = _OPERATIONS.index(operation) << 4 | _PATHS.index(path)
    return code << _CODE_SHIFT | num_bytes


def unpack_ring(ring: Sequence[Sequence[int]], clock_offset_ns: int) -> Recorded:
    """What a device has written; `clock_offset_ns` is what the host's clock is ahead."""
    *entries, (num_calls, wait_ns, *_) = ring
    calls = [_unpack(entry, clock_offset_ns) for entry in entries if entry[1]]
    calls.sort(key=lambda call: call.begun_ns)
    return Recorded(calls, num_calls, wait_ns / 1e9)


def _unpack(entry: Sequence[int], clock_offset_ns: int) -> CollectiveRecord:
    sequence, what, begun, ended = entry
    code = what >> _CODE_SHIFT
    return CollectiveRecord(
        sequence,
        _OPERATIONS[code >> 4],
        _PATHS[code & 15],
        what & ((1 << _CODE_SHIFT) - 1),
        begun + clock_offset_ns,
        # Less than `begun` is what the call before left, read between two stores.
        ended + clock_offset_ns if ended >= begun else 0,
    )
