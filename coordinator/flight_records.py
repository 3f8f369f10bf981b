"""Asks every rank for its last collectives, when the group is lost and before anything ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from coordinator.stall_report import RankRecord
from coordinator.worker_group import WorkerClient
from protos.lockstep.v1 import worker_pb2

_TIMEOUT_S = 1.5  # a worker itself gives its device one second
_MUTE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def collect_records(workers: Sequence[WorkerClient]) -> list[RankRecord]:
    """What each rank recorded, by rank; of all at once, within a limit."""
    return await asyncio.gather(*(_ask(worker) for worker in workers))


async def _ask(worker: WorkerClient) -> RankRecord:
    request = worker_pb2.DumpFlightRecorderRequest()
    response_type = worker_pb2.DumpFlightRecorderResponse
    try:
        answer = await worker.call("DumpFlightRecorder", request, response_type, _TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        # Of a process that is gone or hangs the details are grpc's, about sockets.
        is_mute = error.code() in _MUTE
        return RankRecord(absent=error.code().name if is_mute else f"{error.details()}")
    return RankRecord(answer.collectives, answer.now_nanos)
