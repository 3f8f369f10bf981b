"""How the engine ends, and what it does when a part of it is lost."""

import asyncio
import os
import signal

import grpc
import pytest

from lockstep.daemon.exit_codes import ExitCode
from tests.helpers.engine_harness import make_submit
from tests.helpers.fake_worker import expected_output
from tests.helpers.whole_engine import running_engine


def test_a_signal_drains_frontends_finishes_streams_and_ends_the_workers() -> None:
    async def run() -> None:
        async with running_engine(drain_seconds=7.0) as running:
            first = await running.ready()
            for worker in running.workers:
                worker.settings.delay_s = 0.002
            first.send(submit=make_submit(1, [1], 60))
            await first.heard.until(lambda: len(first.heard.tokens.get(1, [])) > 1)
            os.kill(os.getpid(), signal.SIGTERM)
            await first.heard.until(lambda: bool(first.heard.drains))
            assert first.heard.drains[0].budget_seconds == 7.0
            await first.heard.end_of(1)
            assert first.heard.tokens[1] == expected_output([1], 60)
            first.end(0)
            assert await running.result() == ExitCode.CLEAN
            assert all(worker.is_shut_down.is_set() for worker in running.workers)
            assert not first.was_killed

    asyncio.run(run())


def test_a_second_signal_stops_at_once() -> None:
    async def run() -> None:
        async with running_engine() as running:
            first = await running.ready()
            os.kill(os.getpid(), signal.SIGINT)
            await first.heard.until(lambda: bool(first.heard.drains))
            os.kill(os.getpid(), signal.SIGTERM)
            assert await running.result() == ExitCode.SECOND_SIGNAL
            assert first.was_killed

    asyncio.run(run())


@pytest.mark.parametrize(("return_code", "exit_code"), [(5, 5), (0, 1), (-9, 1)])
def test_a_frontend_that_ends_by_itself_ends_the_coordinator(
    return_code: int, exit_code: int
) -> None:
    async def run() -> None:
        async with running_engine() as running:
            first = await running.ready()
            first.send(submit=make_submit(1, [1], 200))
            first.end(return_code)
            assert await running.result() == exit_code

    asyncio.run(run())


def test_a_lost_rank_turns_readiness_off_before_streams_end() -> None:
    async def run() -> None:
        async with running_engine() as running:
            first = await running.ready()
            running.workers[1].settings.delay_s = 0.002
            first.send(submit=make_submit(1, [1], 400))
            await first.heard.until(lambda: len(first.heard.tokens.get(1, [])) > 1)
            await running.workers[1].stop()
            await first.heard.until(lambda: not first.heard.states[-1].is_ready)
            await first.heard.end_of(1)
            ended = first.heard.ended[1][0]
            assert ended.status_code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert "rank 1 lost at step" in ended.status_message
            assert not any(rank.is_up for rank in first.heard.states[-1].server.ranks)

    asyncio.run(run())
