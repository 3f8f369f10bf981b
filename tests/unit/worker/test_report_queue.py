"""Which reports travel in one message, in what order, and that none is kept for long."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from coordinator.worker_group import one_by_one
from protos.lockstep.v1 import worker_pb2
from worker.report_queue import ReportQueue

_LIMIT_S = 10.0
_LONG_S = 3600.0


def result(step: int) -> worker_pb2.ExecuteResponse:
    return worker_pb2.ExecuteResponse(
        result=worker_pb2.StepResult(command_id=1, step=step, token_ids=bytes(4 * step))
    )


async def message(reports: ReportQueue) -> worker_pb2.ExecuteResponse:
    async with asyncio.timeout(_LIMIT_S):
        return await reports.get()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_results_of_a_command_travel_in_one_message_and_come_out_as_they_were() -> None:
    async def check() -> None:
        reports = ReportQueue(_LONG_S)
        reports.put(result(1), may_wait=True)
        reports.put(result(2), may_wait=True)
        reports.put(result(3))
        reports.put(result(4))
        assert list(one_by_one(await message(reports))) == [result(1), result(2), result(3)]
        assert list(one_by_one(await message(reports))) == [result(4)]

    run(check)


def test_a_result_that_waits_is_sent_though_no_other_comes() -> None:
    async def check() -> None:
        reports = ReportQueue(0.001)
        reports.put(result(1), may_wait=True)
        assert await message(reports) == result(1)
        reports.put(result(2), may_wait=True)  # and the next one waits anew
        assert await message(reports) == result(2)

    run(check)


@pytest.mark.parametrize(
    "other",
    [
        worker_pb2.ExecuteResponse(failure=worker_pb2.RankFailure(message="broken")),
        worker_pb2.ExecuteResponse(progress=worker_pb2.RankProgress(step=1)),
    ],
)
def test_nothing_overtakes_a_result_that_waits(other: worker_pb2.ExecuteResponse) -> None:
    async def check() -> None:
        reports = ReportQueue(_LONG_S)
        reports.put(result(1), may_wait=True)
        reports.put(other)
        assert [await message(reports) for _ in range(2)] == [result(1), other]

    run(check)
