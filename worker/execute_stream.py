"""One Execute stream: commands in, reports out, the device in between.

The event loop receives and sends; the device thread runs commands; the results thread waits for the
device and packs. None waits for another but through a queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future

from google.protobuf.message import DecodeError

from protos.lockstep.v1 import worker_pb2
from worker.collective_watch import CollectiveWatch
from worker.device_thread import DeviceThread
from worker.errors import CommandRefused
from worker.idle_clock import IdleClock
from worker.metrics import WorkerMetrics
from worker.rank_contract import PendingStep, Rank, StepExecutor, StepTime
from worker.report_queue import LONGEST_WAIT_S, ReportQueue

_LOG = logging.getLogger(__name__)
PROGRESS_PERIOD_S = 0.1


class ExecuteStream:
    """Runs the commands of one epoch until the stream ends or something fails."""

    def __init__(
        self,
        rank: Rank,
        executor: StepExecutor,
        device_thread: DeviceThread,
        results_thread: DeviceThread,
        metrics: WorkerMetrics,
        collectives: CollectiveWatch,
    ) -> None:
        self._rank = rank
        self._executor = executor
        self._device_thread = device_thread
        self._results_thread = results_thread
        self._metrics = metrics
        self._collectives = collectives
        self._loop = asyncio.get_running_loop()
        self._reports = ReportQueue()
        self._last_progress = 0.0
        self._last_step = 0
        self._current, self._epoch = (0, 0), 0
        self._idle = IdleClock()
        self._comm_before: float | None = None
        self.last_error = ""

    @property
    def last_step(self) -> int:
        """Last step that has ended on the device."""
        return self._last_step

    async def receive(self, requests: AsyncIterator[worker_pb2.ExecuteRequest]) -> None:
        """Hands every command to the device thread, in order; bytes that are none end the epoch."""
        try:
            async for request in requests:
                arrived = time.monotonic()
                ran = self._device_thread.submit(self._execute, request.command, arrived)
                ran.add_done_callback(self._check)
        except DecodeError as error:
            self.fail(f"a message is no ExecuteRequest: {error}", is_refusal=True)

    async def reports(self) -> AsyncIterator[worker_pb2.ExecuteResponse]:
        """What to send; ends after a failure."""
        while True:
            report = await self._reports.get()
            yield report
            if report.WhichOneof("report") == "failure":
                return

    def fail(self, message: str, *, is_refusal: bool = False) -> None:
        """Ends the stream with a failure; the first one counts. Any thread."""
        if self.last_error:
            return
        command_id, step = self._current
        self.last_error = message
        fields = {"rank": self._rank.rank, "epoch": self._epoch, "step": step or self._last_step}
        _LOG.error("command %d, step %d: %s", command_id, step, message, extra=fields)
        failure = worker_pb2.RankFailure(
            command_id=command_id, step=step, is_refusal=is_refusal, message=message
        )
        self._send(worker_pb2.ExecuteResponse(failure=failure))

    def _execute(self, command: worker_pb2.StepCommand, arrived: float) -> None:
        """On the device thread. After a failure nothing runs any more."""
        if self.last_error:
            return
        self._current, self._epoch = (command.command_id, 0), command.epoch
        last_step = command.first_step + command.step_count - 1
        try:
            for pending in self._executor.execute(command, arrived):
                ran = self._results_thread.submit(self._finish, pending, pending.step == last_step)
                ran.add_done_callback(self._check)
        except CommandRefused as refusal:
            self.fail(str(refusal), is_refusal=True)
            return
        if command.step_count == 0:
            beat = self._results_thread.submit(self._answer_heartbeat, command.command_id, arrived)
            beat.add_done_callback(self._check)

    def _finish(self, pending: PendingStep, is_last: bool) -> None:
        """On the results thread: waits for a step and reports it."""
        took = pending.wait()
        self._idle.step_ended(pending.arrived, took.ended)
        self._last_step = pending.step
        queued_s = max(0.0, took.ended - took.seconds - pending.arrived)
        self._metrics.observe_step(took.seconds, queued_s, self._comm_since_last_step())
        self._metrics.set_all_reduces(self._executor.num_all_reduces)
        if self._rank.rank == 0:
            # The step behind takes about as long: it is worth waiting for if it is quick.
            self._send_result(pending, took, not is_last and took.seconds < LONGEST_WAIT_S)
        elif time.monotonic() - self._last_progress >= PROGRESS_PERIOD_S:
            idle_s = self._idle.seconds_before_last_step
            self._send_progress(pending.command_id, pending.arrived, took.seconds, idle_s)

    def _answer_heartbeat(self, command_id: int, arrived: float) -> None:
        """On the results thread, after every step before it."""
        self._send_progress(command_id, arrived, 0.0, self._idle.seconds(arrived))

    def _check(self, ran: Future[None]) -> None:
        """Ends the epoch with the error of a step; in the thread that ran it."""
        if ran.cancelled():
            return
        error = ran.exception()
        if error is not None:
            message = f"{type(error).__name__}: {error}"
            # A collective that a peer's loss ended says it all by its message.
            is_foreseen = isinstance(error, self._rank.foreseen_errors)
            _LOG.error("step failed: %s", message, exc_info=None if is_foreseen else error)
            self.fail(message)

    def _send_result(self, pending: PendingStep, took: StepTime, may_wait: bool) -> None:
        result = pending.result()
        result.step_micros = _micros(took.seconds)
        result.all_reduce_count = self._executor.num_all_reduces
        result.arrival_micros = _micros(pending.arrived)
        result.idle_micros = _micros(self._idle.seconds_before_last_step)
        result.comm_micros = self._comm_micros()
        result.collective_count, result.collective_micros = self._collectives.totals
        self._send(worker_pb2.ExecuteResponse(result=result), may_wait)

    def _send_progress(self, command_id: int, arrived: float, step_s: float, idle_s: float) -> None:
        self._last_progress = time.monotonic()
        num_collectives, collective_micros = self._collectives.totals
        progress = worker_pb2.RankProgress(
            command_id=command_id,
            step=self._last_step,
            step_micros=_micros(step_s),
            all_reduce_count=self._executor.num_all_reduces,
            arrival_micros=_micros(arrived),
            idle_micros=_micros(idle_s),
            comm_micros=self._comm_micros(),
            collective_count=num_collectives,
            collective_micros=collective_micros,
        )
        self._send(worker_pb2.ExecuteResponse(progress=progress))

    def _send(self, report: worker_pb2.ExecuteResponse, may_wait: bool = False) -> None:
        self._loop.call_soon_threadsafe(self._reports.put, report, may_wait)

    def _comm_since_last_step(self) -> float | None:
        """Time in collectives; None where it is not measured, and for the first step."""
        now, before = self._executor.comm_seconds, self._comm_before
        self._comm_before = now
        return None if now is None or before is None else max(0.0, now - before)

    def _comm_micros(self) -> int:
        seconds = self._executor.comm_seconds
        return -1 if seconds is None else _micros(seconds)


def _micros(seconds: float) -> int:
    return round(seconds * 1e6)
