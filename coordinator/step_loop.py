"""Keeps the ranks busy: plans ahead of the results, sends, and applies what comes back.

A command costs a round trip, so the next ones are sent before the last is reported: at least two
steps and about four milliseconds of work are outstanding. What arrives meanwhile - a request, an
abort, a stop text - takes effect after the outstanding work.
"""

import asyncio
import math
import time
from collections.abc import Callable

from coordinator.batch import Batch
from coordinator.errors import ProtocolBroken, RankLost
from coordinator.metrics import EngineMetrics
from coordinator.progress_watch import ProgressWatch
from coordinator.request_book import RequestBook
from coordinator.results import apply_result
from coordinator.step_log import StepLog
from coordinator.step_snapshot import snapshot_tables
from coordinator.worker_group import loss_by_failure
from protos.lockstep.v1 import worker_pb2

_MIN_AHEAD = 2
_MAX_AHEAD = 8
_AHEAD_S = 0.004
_STEP_TIME_WEIGHT = 0.1  # of the newest step in the moving average
_TABLE_DIGEST_PERIOD_S = 1.0
_HEARTBEAT_IDLE_S = 1.0
_TICK_S = 0.05


class StepLoop:
    """The only mover of an epoch's batch. Everything runs on the event loop's thread.

    `send` gives a serialised command to every rank and `flush` the outbox to the frontends; neither
    may block.
    """

    def __init__(
        self,
        batch: Batch,
        book: RequestBook,
        watch: ProgressWatch,
        metrics: EngineMetrics,
        send: Callable[[bytes], None],
        flush: Callable[[], None],
        step_timeout_s: float,
        step_log: StepLog | None = None,
    ) -> None:
        self._log = step_log
        self._batch = batch
        self._book = book
        self._watch = watch
        self._metrics = metrics
        self._send = send
        self._flush = flush
        self._wakeup = asyncio.Event()
        self._heartbeat_idle_s = min(_HEARTBEAT_IDLE_S, step_timeout_s / 4)
        self._step_s = _AHEAD_S
        self._last_sent_at = time.monotonic()
        self._last_digest_at = 0.0

    @property
    def num_ahead(self) -> int:
        """Commands to keep outstanding at the present step time; none while a segment of the step
        log is due, which begins when nothing is outstanding."""
        if self._log is not None and self._log.is_due:
            return 0
        return min(max(_MIN_AHEAD, math.ceil(_AHEAD_S / self._step_s)), _MAX_AHEAD)

    def wake(self) -> None:
        """Something may have become plannable; planning follows when the event loop is back."""
        self._wakeup.set()

    async def run(self) -> None:
        """Plans whenever woken; ends only by RankLost from a report or by being cancelled."""
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            self._pump()

    async def watch_progress(self) -> None:
        """Finds stalls and sends heartbeats; raises RankLost."""
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self._watch.check(now)
            idle_s = now - self._last_sent_at
            if not self._batch.num_unreported and idle_s >= self._heartbeat_idle_s:
                self._send_heartbeat(now)

    def take_report(self, rank: int, response: worker_pb2.ExecuteResponse) -> None:
        """Applies a report of a rank; raises RankLost if it is a failure or makes no sense."""
        if self._log is not None:
            self._log.received(rank, response)
        kind = response.WhichOneof("report")
        if kind == "result" and rank == 0:
            self._take_result(response.result)
        elif kind == "progress":
            progress = response.progress
            self._watch.reported(
                rank,
                progress.command_id,
                progress.step,
                progress.all_reduce_count,
                time.monotonic(),
            )
        elif kind == "failure":
            raise loss_by_failure(rank, response.failure, self._watch.last_step(rank))
        else:
            raise RankLost(rank, self._watch.last_step(rank) + 1, f"sent an unasked {kind} report")

    def _take_result(self, result: worker_pb2.StepResult) -> None:
        now = time.monotonic()
        try:
            apply_result(result, self._batch, self._book, self._metrics, now)
        except ProtocolBroken as error:
            raise RankLost(0, result.step, str(error)) from error
        self._watch.reported(0, result.command_id, result.step, result.all_reduce_count, now)
        step_s = max(result.step_micros, 1) / 1e6
        self._step_s += _STEP_TIME_WEIGHT * (step_s - self._step_s)
        self._pump()

    def _pump(self) -> None:
        """Sends commands until enough is outstanding, then tells the frontends the news."""
        batch = self._batch
        if not self.num_ahead and not batch.num_unreported:
            self._send_heartbeat(time.monotonic())
        while batch.num_unreported < self.num_ahead:
            now = time.monotonic()
            with_digest = now - self._last_digest_at >= _TABLE_DIGEST_PERIOD_S
            command = batch.next_command(with_digest)
            if command is None:
                break
            if with_digest:
                self._last_digest_at = now
            self._sent(command, now)
        self._metrics.num_requests_running = batch.num_running
        self._metrics.num_requests_waiting = len(batch.queue)
        self._metrics.kv_cache_usage = batch.kv_usage
        self._metrics.preemptions += batch.take_num_preemptions()
        self._flush()

    def _send_heartbeat(self, now: float) -> None:
        """Tells the ranks what has changed, grants nothing; the step log goes on from there."""
        self._batch.check()
        self._sent(self._batch.heartbeat_command(), now)
        if self._log is not None and self._log.is_due:
            self._log.begin_segment(snapshot_tables(self._batch))

    def _sent(self, command: bytes, now: float) -> None:
        self._send(command)
        if self._log is not None:
            self._log.sent(command, self._batch.last_command_id)
        self._last_sent_at = now
        self._watch.sent(self._batch.last_command_id, self._batch.last_step, now)
