"""Sends the commands of a step log to ranks again and compares what they report.

A command is sent once the results that the engine had when it sent it have been reported again, so
the run-ahead is the recorded one; at the recorded pace it also waits for its time.
"""

import asyncio
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable

from coordinator.errors import RankLost
from coordinator.progress_watch import ProgressWatch
from coordinator.replay_comparison import Comparison
from coordinator.replay_tables import ReplayTables, restore_commands
from coordinator.step_command import CommandEncoder, unpack_int32
from coordinator.worker_group import loss_by_failure
from protos.lockstep.v1 import step_log_pb2, worker_pb2

_TICK_S = 0.05


class ReplayRun:
    """One replay on a group that has just come up. Everything runs on the event loop's thread.

    `send` gives a serialised command to every rank and may not block.
    """

    def __init__(
        self,
        snapshot: step_log_pb2.StepLogSnapshot,
        encoder: CommandEncoder,
        watch: ProgressWatch,
        send: Callable[[bytes], None],
        at_recorded_pace: bool,
    ) -> None:
        self.comparison = Comparison()
        self._is_restoring = True
        self._first_steps = array("q")  # of the commands sent that grant steps, and their ids
        self._command_ids = array("q")
        self._snapshot = snapshot
        self._encoder = encoder
        self._watch = watch
        self._send = send
        self._at_recorded_pace = at_recorded_pace
        self._tables = ReplayTables(snapshot)
        self._news = asyncio.Event()
        self._last_reported = 0  # step, in this replay's numbers
        self._expected: dict[int, list[tuple[int, int]]] = {}  # by step, while rebuilding
        # What to add to the log's steps; known once the snapshot is rebuilt.
        self._step_shift = 0
        self._needed = 0  # the log's last step whose result the engine had
        self._clock_shift: float | None = None

    @property
    def last_reported(self) -> int:
        """Last step of this replay, in its own numbers, whose result has come."""
        return self._last_reported

    def logged(self, step: int) -> tuple[int, int]:
        """(command, step) by the log's numbers of a step of this replay; (0, 0) for one that
        rebuilds the snapshot."""
        logged_step = step - self._step_shift
        index = bisect_right(self._first_steps, logged_step) - 1
        return (self._command_ids[index], logged_step) if index >= 0 else (0, 0)

    async def run(
        self, records: Iterable[step_log_pb2.StepLogRecord], max_batch_tokens: int
    ) -> None:
        """Replays all; returns when every rank has reported all that was sent."""
        await self._restore(max_batch_tokens)
        for record in records:
            if record.WhichOneof("record") == "command":
                await self._send_again(record.command)
            elif record.report.rank == 0 and record.report.response.HasField("result"):
                result = record.report.response.result
                self._needed = result.step
                self.comparison.recorded(result)
        # Ranks above 0 do not report each step; this makes them say how far they are.
        self._encode(self._tables.no_change(), 0)
        await self._until(lambda: self._watch.is_settled)

    async def watch_progress(self) -> None:
        """Finds stalls; raises RankLost."""
        while True:
            await asyncio.sleep(_TICK_S)
            self._watch.check(time.monotonic())

    def take_report(self, rank: int, response: worker_pb2.ExecuteResponse) -> None:
        """Takes a report of a rank; raises RankLost if it is a failure or makes no sense."""
        kind = response.WhichOneof("report")
        now = time.monotonic()
        if kind == "failure":
            raise loss_by_failure(rank, response.failure, self._watch.last_step(rank))
        if kind == "result" and rank == 0:
            result = response.result
            self._take_result(result)
            self._watch.reported(0, result.command_id, result.step, result.all_reduce_count, now)
        elif kind == "progress":
            report = response.progress
            self._watch.reported(rank, report.command_id, report.step, report.all_reduce_count, now)
        else:
            raise RankLost(rank, self._watch.last_step(rank) + 1, f"sent an unasked {kind} report")
        self._news.set()

    async def _restore(self, max_batch_tokens: int) -> None:
        for command in restore_commands(self._snapshot, max_batch_tokens):
            self._encode(command.delta, command.num_steps)
            last_step = self._encoder.last_step
            if command.num_steps:
                self._expected[last_step] = list(command.expected)
            await self._until_reported(last_step)
        self._step_shift = self._encoder.last_step - self._snapshot.step
        self._needed = self._snapshot.step
        self._is_restoring = False

    async def _send_again(self, record: step_log_pb2.StepLogCommand) -> None:
        command = worker_pb2.ExecuteRequest.FromString(record.request).command
        for offset, shape in enumerate(self._tables.apply(command)):
            self.comparison.granted(command.first_step + offset, shape)
        await self._until_reported(self._needed + self._step_shift)
        if self._at_recorded_pace:
            await self._wait_for(record.monotonic_micros / 1e6)
        # A slot that was rebuilt has another prefill_len, which the table digest covers.
        is_rebuilt = bool(self._snapshot.command_id)
        self._encode(command.delta, command.step_count, b"" if is_rebuilt else command.table_digest)
        if command.step_count:
            self._first_steps.append(command.first_step)
            self._command_ids.append(command.command_id)
        else:
            # Nothing else limits how many heartbeats of an idle hour would go out at once.
            await self._until(lambda: self._watch.is_settled)

    async def _wait_for(self, recorded_s: float) -> None:
        if self._clock_shift is None:
            self._clock_shift = time.monotonic() - recorded_s
        await asyncio.sleep(recorded_s + self._clock_shift - time.monotonic())

    def _encode(self, delta: bytes, num_steps: int, table_digest: bytes = b"") -> None:
        command = self._encoder.encode(delta, num_steps, table_digest)
        self._watch.sent(self._encoder.last_command_id, self._encoder.last_step, time.monotonic())
        self._send(command)

    def _take_result(self, result: worker_pb2.StepResult) -> None:
        if result.step != self._last_reported + 1:
            raise RankLost(0, result.step, f"reported it after step {self._last_reported}")
        self._last_reported = result.step
        if self._is_restoring:
            self._compare_restored(result)
        else:
            self.comparison.replayed(result.step - self._step_shift, result)

    def _compare_restored(self, result: worker_pb2.StepResult) -> None:
        expected = self._expected.pop(result.step)
        token_ids = unpack_int32(result.token_ids)
        if len(token_ids) != len(expected):
            raise RankLost(0, result.step, f"{len(token_ids)} tokens for {len(expected)} slots")
        for (slot, recorded), replayed in zip(expected, token_ids, strict=True):
            self.comparison.restored(slot, recorded, replayed)

    async def _until_reported(self, step: int) -> None:
        await self._until(lambda: self._last_reported >= step)

    async def _until(self, is_met: Callable[[], bool]) -> None:
        """Waits for reports; stalls are `watch_progress`'s."""
        while not is_met():
            self._news.clear()
            await self._news.wait()
