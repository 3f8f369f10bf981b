"""The ranks as the engine reaches them: a channel each, calls to all at once, step streams."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from coordinator.errors import RankLost
from coordinator.group_access import GroupAccess
from coordinator.tasks import run_until_first_ends
from protos.lockstep.v1 import worker_pb2

_SERVICE = "/lockstep.v1.WorkerService/"
_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]


class WorkerClient:
    """One rank. Its channel lives for one epoch."""

    def __init__(
        self, rank: int, address: str, access: GroupAccess | None = None, epoch: int = 0
    ) -> None:
        """Without `access` it shows nothing, which only a worker without secret takes."""
        self.rank = rank
        self.address = address
        access = access or GroupAccess()
        self.channel = access.channel(address, _CHANNEL_OPTIONS)
        self._metadata = access.metadata(epoch)

    async def call(self, method: str, request: Any, response_type: Any, timeout_s: float) -> Any:
        """A unary call of WorkerService; raises grpc.aio.AioRpcError."""
        unary = self.channel.unary_unary(
            _SERVICE + method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_type.FromString,
        )
        return await unary(request, timeout=timeout_s, metadata=self._metadata)

    def execute(self) -> Any:
        """Opens the step stream; what is written to it is sent as it is."""
        stream = self.channel.stream_stream(
            _SERVICE + "Execute",
            request_serializer=None,
            response_deserializer=worker_pb2.ExecuteResponse.FromString,
        )
        return stream(metadata=self._metadata)

    async def wait_until_gone(self, timeout_s: float) -> bool:
        """Waits until the worker's end of the connection closes; False if it has not by then."""
        try:
            async with asyncio.timeout(timeout_s):
                while (state := self.channel.get_state()) is grpc.ChannelConnectivity.READY:
                    await self.channel.wait_for_state_change(state)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Gives the channel back, cancelling what is open on it."""
        await self.channel.close()


class StepStreams:
    """The Execute streams of all ranks. `take_report` is called for each report as it comes."""

    def __init__(
        self,
        workers: Sequence[WorkerClient],
        take_report: Callable[[int, worker_pb2.ExecuteResponse], None],
    ) -> None:
        self._streams = [_StepStream(worker) for worker in workers]
        self._take_report = take_report

    def send(self, command: bytes) -> None:
        """Hands a serialised ExecuteRequest to every rank; never blocks."""
        for stream in self._streams:
            stream.outgoing.put_nowait(command)

    async def run(self) -> None:
        """Runs until a stream ends; raises RankLost, or what `take_report` raises."""
        await run_until_first_ends(
            *(stream.write_all() for stream in self._streams),
            *(stream.read_all(self._take_report) for stream in self._streams),
        )


class _StepStream:
    def __init__(self, worker: WorkerClient) -> None:
        self.outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._rank = worker.rank
        self._call = worker.execute()

    async def write_all(self) -> None:
        while True:
            command = await self.outgoing.get()
            try:
                await self._call.write(command)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The stream is over; the reader knows why and says so.
                await asyncio.Event().wait()

    async def read_all(
        self, take_report: Callable[[int, worker_pb2.ExecuteResponse], None]
    ) -> None:
        try:
            while (report := await self._call.read()) is not grpc.aio.EOF:
                for one in one_by_one(report):
                    take_report(self._rank, one)
            problem = _describe_end(await self._call.code(), await self._call.details())
        except grpc.aio.AioRpcError as error:
            problem = _describe_end(error.code(), error.details())
        raise RankLost(self._rank, 0, problem)


def one_by_one(report: worker_pb2.ExecuteResponse) -> Sequence[worker_pb2.ExecuteResponse]:
    """The reports that travelled in one message, in order; the message is not to be used again."""
    if not report.earlier_results:
        return [report]
    earlier = [worker_pb2.ExecuteResponse(result=result) for result in report.earlier_results]
    report.ClearField("earlier_results")
    return [*earlier, report]


def loss_by_failure(rank: int, failure: worker_pb2.RankFailure, last_step: int) -> RankLost:
    """What a rank's failure means; `last_step` is the last step that it has reported."""
    verb = "refused" if failure.is_refusal else "failed in"
    return RankLost(
        rank,
        failure.step or last_step + 1,
        f"{verb} command {failure.command_id}: {failure.message}",
    )


def _describe_end(status: grpc.StatusCode, details: str | None) -> str:
    # A write that meets a stream which its server has just ended replaces the server's status by
    # this one (grpc/grpc#36066); the rank's own words come with its answer to Quiesce.
    is_overwritten = (status, details) == (grpc.StatusCode.INTERNAL, "Internal error from Core")
    if status is grpc.StatusCode.OK or is_overwritten:
        return "it ended the step stream"
    return f"its step stream broke: {status.name} {details}"
