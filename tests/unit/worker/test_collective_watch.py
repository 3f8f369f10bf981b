"""What a worker makes of its rank's records once a second."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterator
from typing import cast

import pytest

from protos.lockstep.v1 import worker_pb2
from worker.collective_watch import CollectiveWatch
from worker.metrics import WorkerMetrics
from worker.rank_contract import Rank


class RecordingRank:
    """Answers with what a test has put there, or raises."""

    foreseen_errors = (TimeoutError,)
    rank = 0

    def __init__(self) -> None:
        self.recorded_calls = worker_pb2.DumpFlightRecorderResponse()
        self.error: Exception | None = None

    def enter_thread(self) -> None:
        pass

    def recorded(self) -> worker_pb2.DumpFlightRecorderResponse:
        if self.error is not None:
            raise self.error
        return self.recorded_calls


@pytest.fixture
def metrics() -> Iterator[WorkerMetrics]:
    with WorkerMetrics("m", "127.0.0.1", 0) as served:
        yield served


def dump(*calls: tuple[int, int]) -> worker_pb2.DumpFlightRecorderResponse:
    return worker_pb2.DumpFlightRecorderResponse(
        collectives=[
            worker_pb2.CollectiveRecord(
                operation="all_reduce", path="fused", begun_nanos=begun, ended_nanos=ended
            )
            for begun, ended in calls
        ],
        ended_count=70,
        ended_micros=900,
    )


def num_observed(metrics: WorkerMetrics) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    (line,) = [line for line in text.splitlines() if "collective_seconds_count" in line]
    assert 'operation="all_reduce",path="fused"' in line
    return int(float(line.rpartition(" ")[2]))


def test_each_call_is_counted_once_and_not_before_it_has_ended(metrics: WorkerMetrics) -> None:
    watch = CollectiveWatch(cast(Rank, RecordingRank()), metrics)
    watch.take(dump((1000, 1500), (2000, 2600), (3000, 0)))
    assert num_observed(metrics) == 2 and watch.totals == (70, 900)
    watch.take(dump((2000, 2600), (3000, 3700), (4000, 4100)))
    assert num_observed(metrics) == 4
    watch.close()


def test_a_device_that_does_not_answer_ends_no_watch_and_a_bug_does(
    metrics: WorkerMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.collective_watch._PERIOD_S", 0.001)
    rank = RecordingRank()
    rank.error = TimeoutError("planted")

    async def run() -> None:
        watch = CollectiveWatch(cast(Rank, rank), metrics)
        watching = asyncio.create_task(watch.run())
        done, _ = await asyncio.wait([watching], timeout=0.1)
        assert not done
        rank.error, rank.recorded_calls = None, dump((1000, 1500))
        async with asyncio.timeout(10):
            while watch.totals == (0, 0):
                await asyncio.sleep(0.001)
        rank.error = ValueError("planted")
        with pytest.raises(ValueError, match="planted"):
            await asyncio.wait_for(watching, 10)
        watch.close()

    asyncio.run(run())
