"""Writes the step log: a bounded ring of files from which `lockstep replay` can start again.

The event loop appends records to a buffer and never waits; a thread writes what has gathered. What
the disk cannot take is dropped whole, counted, and marked by a gap. docs/replay.md has the rest.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from coordinator.frames import framed
from coordinator.metrics import EngineMetrics
from coordinator.step_log_files import SegmentRing
from protos.lockstep.v1 import step_log_pb2, worker_pb2

_LOG = logging.getLogger(__name__)
FORMAT_VERSION = 1
_FLUSH_PERIOD_S = 0.05
_JOIN_LIMIT_S = 10.0
_MAX_PENDING_BYTES = 16 << 20
_NUM_SEGMENTS = 4
# A segment is due at a fifth of the ring and full at a quarter: what is reported while the step
# loop comes to rest for the next one still has room.
_DUE_SHARE = 5
_END_ROOM = 4096  # kept for the gap and end records
_LONGEST_CAUSE = 1000  # characters, of at most 4 bytes each


class StepLog:
    """The log of one coordinator, epoch after epoch. Used by the event loop; owns its thread.

    Use as a context manager, or `close`. Errors of the disk never reach the caller.
    """

    def __init__(self, path: Path, max_bytes: int, metrics: EngineMetrics) -> None:
        """`max_bytes` bounds all segments together. OSError if the folder cannot be read."""
        self._segment_bytes = max_bytes // _NUM_SEGMENTS
        self._due_bytes = max_bytes // _DUE_SHARE
        self._ring = SegmentRing(path, max_bytes, self._segment_bytes)
        self._metrics = metrics
        self._header: step_log_pb2.StepLogHeader | None = None  # None: between epochs
        self._num_bytes = 0  # of the present segment
        self._num_missing = 0  # records dropped since the last one that was kept
        self._last_command_id = 0
        self._has_failed = False
        self._lock = threading.Lock()  # guards all below, and the metrics
        self._pending: list[bytes | None] = []  # None: a new file begins
        self._num_pending_bytes = 0
        self._is_closing = threading.Event()
        # A daemon thread: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._write_all, name="step-log", daemon=True)
        self._thread.start()
        metrics.step_log_up = True

    @property
    def is_due(self) -> bool:
        """The next segment is to begin as soon as nothing is outstanding."""
        if self._header is None or self._has_failed:
            return False
        if self._num_missing:
            return not self._pending  # the disk is there again
        return self._num_bytes >= self._due_bytes

    def begin_epoch(
        self,
        epoch: int,
        version: str,
        model_digest: str,
        config: worker_pb2.EngineConfig,
        world_size: int,
        num_blocks: int,
    ) -> None:
        """A group has come up, with empty tables."""
        self._header = step_log_pb2.StepLogHeader(
            format_version=FORMAT_VERSION,
            package_version=version,
            model_digest=model_digest,
            config=config,
            world_size=world_size,
            block_count=num_blocks,
            epoch=epoch,
        )
        self._last_command_id = 0
        self._num_missing = 0
        self.begin_segment(step_log_pb2.StepLogSnapshot())

    def begin_segment(self, snapshot: step_log_pb2.StepLogSnapshot) -> None:
        """Begins the next file. Nothing may be outstanding and every change must be sent."""
        if self._header is None or self._has_failed:
            return
        self._header.unix_micros = time.time_ns() // 1000
        self._header.monotonic_micros = _now_micros()
        head = framed(step_log_pb2.StepLogRecord(header=self._header))
        head += framed(step_log_pb2.StepLogRecord(snapshot=snapshot))
        if len(head) > self._segment_bytes // 2:
            self._fail(
                f"a snapshot of {len(head)} bytes does not leave half of a segment of "
                f"{self._segment_bytes} bytes; raise --step-log-bytes"
            )
            return
        self._mark_gap()
        self._num_bytes = 0
        self._put(None, head)

    def sent(self, command: bytes, command_id: int) -> None:
        """A serialised ExecuteRequest goes out to all ranks."""
        record = step_log_pb2.StepLogCommand(monotonic_micros=_now_micros(), request=command)
        if self._append(step_log_pb2.StepLogRecord(command=record)):
            self._last_command_id = command_id

    def received(self, rank: int, response: worker_pb2.ExecuteResponse) -> None:
        """A rank reported. `response` is copied."""
        record = step_log_pb2.StepLogReport(
            monotonic_micros=_now_micros(), rank=rank, response=response
        )
        self._append(step_log_pb2.StepLogRecord(report=record))

    def end_epoch(self, cause: str) -> None:
        """The epoch is over; `cause` is empty if no rank was lost. May be called again."""
        if self._header is None or self._has_failed:
            return
        self._mark_gap()
        end = step_log_pb2.StepLogEnd(cause=cause[:_LONGEST_CAUSE], monotonic_micros=_now_micros())
        self._put(framed(step_log_pb2.StepLogRecord(end=end)))
        self._header = None

    def close(self) -> None:
        """Writes what is left and joins the thread."""
        self.end_epoch("")
        self._is_closing.set()
        self._thread.join(_JOIN_LIMIT_S)
        if self._thread.is_alive():
            _LOG.warning("step log: the disk has not taken the rest in %g s", _JOIN_LIMIT_S)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, record: step_log_pb2.StepLogRecord) -> bool:
        """Keeps a record, or drops and counts it. After one is dropped so is all until the next
        segment: a replay could not use it."""
        if self._header is None:
            return False
        if not self._has_failed and not self._num_missing:
            packed = framed(record)
            has_room = self._num_bytes + len(packed) <= self._segment_bytes - _END_ROOM
            if has_room and self._num_pending_bytes + len(packed) <= _MAX_PENDING_BYTES:
                self._put(packed)
                return True
        self._num_missing += 1
        with self._lock:
            self._metrics.step_log_dropped += 1
        return False

    def _mark_gap(self) -> None:
        if self._num_missing:
            gap = step_log_pb2.StepLogGap(
                dropped_count=self._num_missing, command_id=self._last_command_id
            )
            self._put(framed(step_log_pb2.StepLogRecord(gap=gap)))
            self._num_missing = 0

    def _put(self, *items: bytes | None) -> None:
        num_bytes = sum(len(item) for item in items if item is not None)
        with self._lock:
            self._pending += items
            self._num_pending_bytes += num_bytes
        self._num_bytes += num_bytes

    def _write_all(self) -> None:
        is_closing = False
        while not is_closing:
            is_closing = self._is_closing.wait(_FLUSH_PERIOD_S)
            with self._lock:
                items, self._pending = self._pending, []
                self._num_pending_bytes = 0
            if items:
                self._write(items)
        self._ring.close()

    def _write(self, items: Sequence[bytes | None]) -> None:
        num_records = sum(item is not None for item in items)
        if self._has_failed:  # these were put while that was found out
            with self._lock:
                self._metrics.step_log_dropped += num_records
            return
        try:
            self._ring.write(items)
        except OSError as error:
            # The one failure that is carried on from: requests are worth more than their log.
            self._fail(str(error), num_records)

    def _fail(self, problem: str, num_lost: int = 0) -> None:
        """Stops logging for good. Either thread."""
        with self._lock:
            self._has_failed = True
            self._metrics.step_log_up = False
            self._metrics.step_log_dropped += num_lost
        _LOG.error("the step log stops here, serving goes on: %s", problem)


def _now_micros() -> int:
    return time.monotonic_ns() // 1000
