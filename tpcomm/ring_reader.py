"""Reads a ring of records from a GPU while another stream may hang on it."""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

from tpcomm.errors import CommTimeout
from tpcomm.record_kernels import begin_stamp
from tpcomm.records import BARRIER, Recorded, unpack_ring
from tpcomm.staging_tables import make_ring

_LIMIT_S = 1.0
_POLL_S = 0.0002
_HIGH_PRIORITY = -1  # a pool of streams of its own: torch would deal out one that hangs


class RingReader:
    """Copies to pinned memory on a stream of its own. Any thread may read.

    A copy runs in a thread that is left behind if the driver never returns; nobody reads then.
    """

    def __init__(self, device: torch.device, limit_s: float = _LIMIT_S) -> None:
        """Sets the device's clock against the host's; waits for the device once."""
        self._device = device
        self._limit_s = limit_s
        self._stream: torch.cuda.Stream = torch.cuda.Stream(  # type: ignore[no-untyped-call]
            device, priority=_HIGH_PRIORITY
        )
        self._copy = make_ring(torch.device("cpu")).pin_memory()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._clock_offset_ns = self._compare_clocks()

    def read(self, ring: Tensor) -> Recorded:
        """What the ring holds.

        Raises:
            CommTimeout: the device did not answer within the limit, now or before.
        """
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                raise self._timeout()
            entries: list[list[int]] = []
            self._thread = threading.Thread(
                target=self._fetch, args=(ring, entries), name="tpcomm-record", daemon=True
            )
            self._thread.start()
            self._thread.join(self._limit_s)
            if self._thread.is_alive() or not entries:
                raise self._timeout()
            newest = max(max(begun, ended) for _, _, begun, ended in entries[:-1])
            # Nothing recorded lies in the future: the clocks drift apart over days.
            self._clock_offset_ns = min(self._clock_offset_ns, time.monotonic_ns() - newest)
            return unpack_ring(entries, self._clock_offset_ns)

    def _fetch(self, ring: Tensor, entries: list[list[int]]) -> None:
        deadline = time.monotonic() + self._limit_s
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._copy.copy_(ring, non_blocking=True)
            copied = self._stream.record_event()
        while not copied.query():
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)
        entries.extend(self._copy.tolist())

    def _timeout(self) -> CommTimeout:
        return CommTimeout(
            f"the record of collectives could not be read from {self._device} within "
            f"{self._limit_s:g} s"
        )

    def _compare_clocks(self) -> int:
        """What the host's monotonic clock is ahead of the device's, in nanoseconds."""
        state = torch.zeros(1, dtype=torch.int64, device=self._device)
        ring = make_ring(self._device)
        stamp = begin_stamp(state, ring, BARRIER, 0)
        with torch.cuda.device(self._device):
            stamp.run()  # compiles and loads it
            torch.cuda.synchronize()
            before = time.monotonic_ns()
            stamp.run()
            torch.cuda.synchronize()
            after = time.monotonic_ns()
        return (before + after) // 2 - int(ring[0, 2])
