"""The last collectives of a rank whose calls block on the host, and the counts of all of them."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from tpcomm.communicator import CommStats, OpStats
from tpcomm.records import RING_ENTRIES, CollectiveRecord, Recorded

_Call = tuple[int, str, int, float]  # sequence, operation, bytes, begun; of time.perf_counter


class CallLog:
    """Written by the thread that issues collectives; `recorded` comes from any thread.

    It is on the path of every small message: what it costs is a good part of what is counted here.
    """

    def __init__(self, path: str) -> None:
        self.stats = CommStats(seconds=0.0)
        self._path = path
        self._num_calls = 0
        self._current: _Call | None = None
        self._ended: deque[tuple[_Call, float]] = deque(maxlen=RING_ENTRIES)

    def begin(self, operation: str, counts: OpStats, num_bytes: int) -> None:
        """A collective begins. One that raises stays without end."""
        counts.calls += 1
        counts.bytes += num_bytes
        self._num_calls = sequence = self._num_calls + 1
        self._current = (sequence, operation, num_bytes, time.perf_counter())

    def end(self) -> None:
        """It is complete on this rank."""
        ended, call = time.perf_counter(), self._current
        assert call is not None
        self._ended.append((call, ended))
        self._current = None
        stats = self.stats
        assert stats.seconds is not None
        stats.seconds += ended - call[3]

    def recorded(self) -> Recorded:
        """From any thread."""
        # In this order, so that a call which ends meanwhile is seen twice rather than not at all.
        current = self._current
        calls = {call[0]: (call, ended) for call, ended in self._ended.copy()}
        if current is not None:
            calls.setdefault(current[0], (current, 0.0))
        records = [self._record(call, ended) for call, ended in calls.values()]
        num_ended = self._num_calls - (current is not None)
        return Recorded(records, num_ended, self.stats.seconds or 0.0)

    def _record(self, call: _Call, ended: float) -> CollectiveRecord:
        sequence, operation, num_bytes, begun = call
        # On Linux perf_counter is CLOCK_MONOTONIC.
        times = int(begun * 1e9), int(ended * 1e9)
        return CollectiveRecord(sequence, operation, self._path, num_bytes, *times)


class _Logged(Protocol):
    log: CallLog


S = TypeVar("S", bound=_Logged)
P = ParamSpec("P")
R = TypeVar("R")


def logged(collective: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Ends in the log what the method has begun there, once its result is complete."""

    @functools.wraps(collective)
    def ended(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result = collective(self, *args, **kwargs)
        self.log.end()
        return result

    return ended
