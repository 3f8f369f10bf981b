"""What the step loop does in which turn of the event loop: the ranks come before the clients."""

import asyncio
from collections.abc import Sequence

import pytest

from coordinator.admission import ModelLimits
from coordinator.admission_control import QueueLimits
from coordinator.arrival_skew import ArrivalSkew
from coordinator.broadcast_time import BroadcastTime
from coordinator.collective_skew import CollectiveSkew
from coordinator.constraints import Constraints
from coordinator.errors import RankLost
from coordinator.metrics import EngineMetrics
from coordinator.outbox import Outbox
from coordinator.progress_watch import ProgressWatch
from coordinator.request_book import RequestBook
from coordinator.step_loop import StepLoop
from protos.lockstep.v1 import engine_pb2, worker_pb2
from tests.helpers.batch_history import BLOCK_SIZE, Rank, make_batch
from tests.helpers.engine_harness import NoMasks, make_submit
from tests.helpers.fake_worker import expected_output


class Loop:
    """A step loop whose one rank does nothing until it is told to."""

    def __init__(self) -> None:
        batch = make_batch(num_blocks=64)
        self._outbox, metrics = Outbox(), EngineMetrics("loop")
        self.book = RequestBook(self._outbox, metrics, QueueLimits(64), Constraints(NoMasks()))
        self.book.open(batch, ModelLimits(200, 1000, 63, BLOCK_SIZE))
        self._tables = Rank(batch).tables
        self.sent: list[bytes] = []
        self.flushed: list[list[engine_pb2.EngineMessage]] = []
        self.loop = StepLoop(
            batch,
            self.book,
            ProgressWatch(1, 5.0),
            ArrivalSkew(["boot"]),
            CollectiveSkew(1),
            BroadcastTime(["boot"], "boot", metrics.observe_broadcast),
            metrics,
            self.sent.append,
            lambda: self.flushed.append(self._outbox.take().get(0, [])),
            5.0,
        )

    def results(self, index: int) -> Sequence[worker_pb2.ExecuteResponse]:
        """What the rank reports of the command that was sent at that place."""
        command = worker_pb2.ExecuteRequest.FromString(self.sent[index]).command
        delta = worker_pb2.TableDelta.FromString(command.delta)
        self._tables.apply(delta)
        return list(self._tables.run(command, delta))

    @property
    def num_tokens_told(self) -> int:
        """Tokens that the frontend has."""
        return sum(len(m.outputs.token_ids) // 4 for some in self.flushed for m in some)

    async def turn(self) -> None:
        """Lets the loop do what it was woken for."""
        for _ in range(3):
            await asyncio.sleep(0)


async def started(stop_ids: Sequence[int] = ()) -> tuple[Loop, asyncio.Task[None]]:
    """One request runs and two commands are outstanding."""
    it = Loop()
    task = asyncio.create_task(it.loop.run())
    it.book.submit(0, make_submit(1, [5], 100, stop_ids=stop_ids))
    it.loop.wake()
    await it.turn()
    assert len(it.sent) == 2 and it.num_tokens_told == 0
    return it, task


def test_the_next_command_is_sent_before_the_tokens_are_given_out() -> None:
    async def run() -> None:
        it, task = await started()
        (report,) = it.results(0)
        it.loop.take_report(0, report)
        assert len(it.sent) == 3 and it.num_tokens_told == 0
        await it.turn()
        assert it.num_tokens_told == 1
        task.cancel()

    asyncio.run(run())


def test_results_of_one_turn_are_told_at_once() -> None:
    async def run() -> None:
        it, task = await started()
        before = len(it.flushed)
        for report in (*it.results(0), *it.results(1)):
            it.loop.take_report(0, report)
        await it.turn()
        assert len(it.flushed) == before + 1 and it.num_tokens_told == 2
        task.cancel()

    asyncio.run(run())


def test_who_has_stopped_is_granted_no_further_step() -> None:
    async def run() -> None:
        it, task = await started(stop_ids=expected_output([5], 1))
        it.loop.take_report(0, *it.results(0))
        assert len(it.sent) == 2
        task.cancel()

    asyncio.run(run())


def test_tokens_that_came_before_a_failure_are_given_out() -> None:
    async def run() -> None:
        it, task = await started()
        it.loop.take_report(0, *it.results(0))
        failure = worker_pb2.RankFailure(command_id=2, step=2, message="broken")
        with pytest.raises(RankLost, match="broken"):
            it.loop.take_report(0, worker_pb2.ExecuteResponse(failure=failure))
        task.cancel()
        it.book.close("restarting", "broken")
        it.loop._flush()
        assert it.num_tokens_told == 1

    asyncio.run(run())


async def in_a_long_step(step_s: float) -> tuple[Loop, asyncio.Task[None]]:
    """The last command's one step runs, which takes `step_s` by what is known."""
    it, task = await started()
    for index in range(80):
        (report,) = it.results(index)
        report.result.step_micros = round(step_s * 1e6)
        it.loop.take_report(0, report)
        await it.turn()
    assert len(it.sent) == 81
    return it, task


def test_behind_a_long_step_a_command_waits_for_who_comes_meanwhile() -> None:
    async def run() -> None:
        it, task = await in_a_long_step(60.0)
        it.book.submit(0, make_submit(2, [6], 100))
        it.loop.wake()
        await it.turn()
        assert len(it.sent) == 81
        it.loop.take_report(0, *it.results(80))
        command = worker_pb2.ExecuteRequest.FromString(it.sent[81]).command
        delta = worker_pb2.TableDelta.FromString(command.delta)
        assert [opened.slot for opened in delta.opened_slots] == [2]
        task.cancel()

    asyncio.run(run())


def test_a_command_that_waits_is_sent_in_time() -> None:
    async def run() -> None:
        it, task = await in_a_long_step(0.05)
        async with asyncio.timeout(10.0):
            while len(it.sent) == 81:
                await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(run())


def test_a_loop_that_ends_plans_no_more() -> None:
    async def run() -> None:
        it, task = await in_a_long_step(60.0)
        assert it.loop._planning_later is not None
        task.cancel()
        await asyncio.wait([task])
        assert it.loop._planning_later is None

    asyncio.run(run())
