"""Reads what a rank records of its collectives once a second: for metrics and reports."""

from __future__ import annotations

import asyncio
import logging

from protos.lockstep.v1 import worker_pb2
from worker.device_thread import DeviceThread
from worker.metrics import WorkerMetrics
from worker.rank_contract import Rank

_LOG = logging.getLogger(__name__)
_PERIOD_S = 1.0


class CollectiveWatch:
    """Has a thread of its own, so that it answers while a step hangs. On the event loop."""

    def __init__(self, rank: Rank, metrics: WorkerMetrics) -> None:
        self._rank = rank
        self._metrics = metrics
        self._thread = DeviceThread("records", rank.enter_thread)
        self._last_begun_nanos = 0
        self._totals = 0, 0

    @property
    def totals(self) -> tuple[int, int]:
        """(collectives, their microseconds) when they were read last. Any thread."""
        return self._totals

    async def read(self) -> worker_pb2.DumpFlightRecorderResponse:
        """What the rank has recorded; raises what Rank.recorded raises."""
        return await self._thread.run(self._rank.recorded)

    async def run(self) -> None:
        """Reads until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                self.take(await self.read())
            except self._rank.foreseen_errors as error:
                _LOG.warning("%s", error, extra={"rank": self._rank.rank})

    def take(self, recorded: worker_pb2.DumpFlightRecorderResponse) -> None:
        """Counts the collectives that have not been seen; only the last ones are among them."""
        self._totals = recorded.ended_count, recorded.ended_micros
        fresh = [
            call
            for call in recorded.collectives
            if call.ended_nanos and call.begun_nanos > self._last_begun_nanos
        ]
        for call in fresh:
            seconds = (call.ended_nanos - call.begun_nanos) / 1e9
            self._metrics.observe_collective(call.operation, call.path, seconds)
        if fresh:
            self._last_begun_nanos = fresh[-1].begun_nanos

    def close(self) -> None:
        """Does not wait for a read."""
        self._thread.close()
