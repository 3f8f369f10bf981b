"""Step streams over real gRPC, ended by a server while the coordinator writes."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from coordinator.errors import RankLost
from coordinator.worker_group import StepStreams, WorkerClient
from protos.lockstep.v1 import worker_pb2, worker_pb2_grpc


class _EndsAtOnce(worker_pb2_grpc.WorkerServiceServicer):
    """Ends every step stream well, without a word, at the first command."""

    async def Execute(  # type: ignore[no-untyped-def]
        self, request_iterator: AsyncIterator[worker_pb2.ExecuteRequest], context
    ) -> AsyncIterator[worker_pb2.ExecuteResponse]:
        async for _ in request_iterator:
            return
        yield worker_pb2.ExecuteResponse()


async def _write_until_it_ends(address: str) -> str:
    """Writes as fast as the stream takes it; returns what the coordinator says of the end."""
    worker = WorkerClient(0, address)
    streams = StepStreams([worker], lambda rank, report: None)
    command = worker_pb2.ExecuteRequest(command=worker_pb2.StepCommand(delta=b"x" * 4096))
    for _ in range(200):
        streams.send(command.SerializeToString())
    try:
        with pytest.raises(RankLost) as lost:
            async with asyncio.timeout(10):
                await streams.run()
    finally:
        await worker.close()
    return lost.value.problem


def test_a_stream_ended_under_a_write_is_said_to_have_ended() -> None:
    async def run() -> set[str]:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(_EndsAtOnce(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            return {await _write_until_it_ends(f"127.0.0.1:{port}") for _ in range(60)}
        finally:
            await server.stop(grace=None)

    assert asyncio.run(run()) == {"it ended the step stream"}
