"""Keeps the ranks busy: plans ahead of the results, sends, and applies what comes back.

A command costs a round trip, so the next ones are sent before the last is reported (`pacing.py`).
What arrives meanwhile - a request, an abort, a stop text - takes effect after the outstanding work.
"""

import asyncio
import time
from collections.abc import Callable

from coordinator.arrival_skew import ArrivalSkew
from coordinator.batch import Batch
from coordinator.broadcast_time import BroadcastTime
from coordinator.collective_skew import CollectiveSkew
from coordinator.errors import ProtocolBroken, RankLost
from coordinator.metrics import EngineMetrics
from coordinator.pacing import Pacing
from coordinator.progress_watch import ProgressWatch
from coordinator.request_book import RequestBook
from coordinator.results import Resolved, apply_results, resolve_result
from coordinator.step_log import StepLog
from coordinator.step_snapshot import snapshot_tables
from coordinator.worker_group import loss_by_failure
from protos.lockstep.v1 import worker_pb2

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
        skew: ArrivalSkew,
        collective_skew: CollectiveSkew,
        broadcast: BroadcastTime,
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
        self._skew = skew
        self._collective_skew = collective_skew
        self._broadcast = broadcast
        self._pacing = Pacing()
        self._metrics = metrics
        self._send = send
        self._flush = flush
        self._wakeup = asyncio.Event()
        self._untold: list[tuple[Resolved, float]] = []  # results whose tokens nobody has yet
        self._heartbeat_idle_s = min(_HEARTBEAT_IDLE_S, step_timeout_s / 4)
        self._last_sent_at = time.monotonic()
        self._running_since = 0.0  # the next step to be reported
        self._planning_later: asyncio.TimerHandle | None = None
        self._last_digest_at = 0.0
        self._last_audited_step = 0

    def wake(self) -> None:
        """Something may have become plannable; planning follows when the event loop is back."""
        self._wakeup.set()

    async def run(self) -> None:
        """Gives out tokens and plans whenever woken; ends by RankLost or by being cancelled."""
        try:
            while True:
                await self._wakeup.wait()
                self._wakeup.clear()
                self._give_out_tokens()
                self._plan()
                await asyncio.sleep(0)  # what was planned leaves first: to tell of it takes longer
                self._tell()
        finally:
            self._plan_later(0.0)

    async def watch_progress(self) -> None:
        """Finds stalls and sends heartbeats; raises RankLost."""
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self._watch.check(now)
            if self._book.tick(now):
                self.wake()
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
            self._note_clocks(rank, progress)
            self._watch.reported(
                rank,
                progress.command_id,
                progress.step,
                progress.all_reduce_count,
                time.monotonic(),
            )
        elif kind == "failure":
            self._give_out_tokens()
            raise loss_by_failure(rank, response.failure, self._watch.last_step(rank))
        else:
            raise RankLost(rank, self._watch.last_step(rank) + 1, f"sent an unasked {kind} report")

    def _take_result(self, result: worker_pb2.StepResult) -> None:
        """Plans what comes next. The tokens are given out once the event loop has sent that: the
        ranks wait for it, and giving out takes longer."""
        self._running_since = now = time.monotonic()
        batch = self._batch
        self._pacing.observe(
            result.step_micros, result.idle_micros, batch.outstanding.is_mixed_step_next
        )
        try:
            resolved = resolve_result(result, batch)
        except ProtocolBroken as error:
            raise RankLost(0, result.step, str(error)) from error
        self._untold.append((resolved, now))
        if not resolved.is_plain:
            self._give_out_tokens()
        self._watch.reported(0, result.command_id, result.step, result.all_reduce_count, now)
        self._note_clocks(0, result)
        self._plan()
        self.wake()

    def _give_out_tokens(self) -> None:
        """Applies the results that have come, in order; their tokens are in the outbox then."""
        untold, self._untold = self._untold, []
        try:
            apply_results(untold, self._batch, self._book, self._metrics)
        except ProtocolBroken as error:
            raise RankLost(0, untold[-1][0].result.step, str(error)) from error

    def _note_clocks(
        self, rank: int, report: worker_pb2.StepResult | worker_pb2.RankProgress
    ) -> None:
        self._skew.arrived(rank, report.command_id, report.arrival_micros)
        self._broadcast.arrived(rank, report.command_id, report.arrival_micros)
        self._collective_skew.reported(rank, report.collective_count, report.collective_micros)
        self._metrics.worker_idle_seconds[rank] = report.idle_micros / 1e6

    def _tell(self) -> None:
        """Notes where the batch stands and tells the frontends the news."""
        batch = self._batch
        self._pacing.planned(batch.num_unreported > 0)
        self._metrics.num_requests_running = batch.num_running
        self._metrics.num_requests_waiting = batch.num_waiting
        self._metrics.kv_cache_usage = batch.kv_usage
        self._metrics.preemptions += batch.take_num_preemptions()
        num_queries, num_hits = batch.prefix_cache.take_counts()
        self._metrics.prefix_cache_queries += num_queries
        self._metrics.prefix_cache_hits += num_hits
        self._flush()

    def _plan(self) -> None:
        """Sends commands until enough is outstanding, or sees to it that this is done in time."""
        batch = self._batch
        self._plan_later(0.0)
        is_log_due = self._turn_log()
        max_steps = self._pacing.steps_per_grant
        has_masks = batch.slots.num_constrained > 0
        while not is_log_due and self._pacing.wants_more(batch.outstanding, max_steps, has_masks):
            elapsed_s = time.monotonic() - self._running_since
            if early_s := self._pacing.too_early_s(batch.outstanding, elapsed_s, has_masks):
                self._plan_later(early_s)
                break
            if batch.queue.num_preempted:  # who begins again, begins with all its tokens
                self._give_out_tokens()
            now = time.monotonic()
            with_digest = now - self._last_digest_at >= _TABLE_DIGEST_PERIOD_S
            command = batch.next_command(with_digest, max_steps)
            if command is None:
                break
            if with_digest:
                self._last_digest_at = now
            self._sent(command, now)

    def _plan_later(self, delay_s: float) -> None:
        """Has `run` woken after so long, in whole milliseconds as uvloop counts; 0: not at all."""
        if self._planning_later is not None:
            self._planning_later.cancel()
            self._planning_later = None
        if delay_s:
            loop = asyncio.get_running_loop()
            self._planning_later = loop.call_later(int(delay_s * 1e3) / 1e3, self.wake)

    def _turn_log(self) -> bool:
        """Whether to grant nothing: a segment of the step log is due and begins when nothing is
        outstanding any more."""
        if self._log is None or not self._log.is_due:
            return False
        if not self._batch.num_unreported:
            self._send_heartbeat(time.monotonic())
        return self._log.is_due

    def _send_heartbeat(self, now: float) -> None:
        """Tells the ranks what has changed, grants nothing; the step log goes on from there."""
        self._give_out_tokens()
        if self._last_audited_step != self._batch.last_step:
            self._batch.check()
            self._last_audited_step = self._batch.last_step
        self._sent(self._batch.heartbeat_command(), now)
        if self._log is not None and self._log.is_due:
            self._batch.allocator.forget_kept()
            self._log.begin_segment(snapshot_tables(self._batch))

    def _sent(self, command: bytes, now: float) -> None:
        self._broadcast.sent(self._batch.last_command_id, time.monotonic())
        self._send(command)
        self._book.command_sent(now)
        if self._log is not None:
            self._log.sent(command, self._batch.last_command_id)
        self._last_sent_at = now
        if self._batch.num_unreported == 1:  # it does not wait for another one
            self._running_since = now
        self._watch.sent(self._batch.last_command_id, self._batch.last_step, now)
