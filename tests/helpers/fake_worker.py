"""A worker without a model: follows docs/protocol.md in this process, over real gRPC.

It keeps its own tables from the deltas, refuses what the protocol says a worker refuses, and takes
its tokens from `choose_token`, so that a test knows every output beforehand. It remembers which
token ids were written to every block: a slot opened with cached blocks continues what they really
hold, so that a wrong block shows as a refusal or as another output.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc

from lockstep.daemon.process_identity import boot_id, start_ticks
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import worker_pb2, worker_pb2_grpc
from tests.helpers.fake_tables import FakeTables, Refusal, require


def successor(token_ids: list[int]) -> int:
    """A token that depends on every one before it and on their order, so that slips show."""
    return hash(tuple(token_ids)) % 1000


def expected_output(
    prompt_ids: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()
) -> list[int]:
    """What a request must get from workers that use `successor`."""
    token_ids = list(prompt_ids)
    for _ in range(max_tokens):
        token_ids.append(successor(token_ids))
        if token_ids[-1] in stop_ids:
            break
    return token_ids[len(prompt_ids) :]


@dataclass
class FakeSettings:
    """What a test plants; read whenever it matters, so it may change while the worker runs."""

    num_blocks: int = 64
    vocab_size: int = 1000
    version: str = __version__
    digest: str = ""
    device_uuid: str = ""
    choose_token: Callable[[list[int]], int] = successor
    phase_errors: dict[str, tuple[grpc.StatusCode, str]] = field(default_factory=dict)
    is_stalled: bool = False
    stall_at_command: int = 0
    fail_at_command: int = 0
    fail_message: str = "planted failure"
    refuse_at_command: int = 0
    break_stream_at_command: int = 0
    silent_on_quiesce: bool = False
    # A replay rebuilds a snapshot's shared blocks once for each who shares them.
    rebuilds_shared: bool = False
    last_error: str = ""
    collectives: list[worker_pb2.CollectiveRecord] | None = None  # None: answers UNIMPLEMENTED
    not_finite_token: int = -1  # choosing this token counts as non-finite logits
    step_micros: int = 5000
    comm_micros: int = 1000  # of every step; -1: not measured
    delay_s: float = 0.0  # for every step


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """One rank; `serve` starts it on a free port."""

    def __init__(self, settings: FakeSettings) -> None:
        self.settings = settings
        self.commands: list[worker_pb2.StepCommand] = []
        self.calls: list[str] = []
        self.meeting_host = ""
        self.config = worker_pb2.EngineConfig()
        self.is_shut_down = asyncio.Event()
        self.address = ""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._epoch = 0
        self._rank = 0
        self._num_blocks = 0
        self._released = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None

    async def serve(self, port: int = 0) -> str:
        """Serves on the loopback; returns host:port."""
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        self.address = f"127.0.0.1:{bound}"
        return self.address

    async def stop(self) -> None:
        """Ends at once, as a killed process does."""
        self._released.set()
        if self._stopping is not None:
            await self._stopping
        await self._server.stop(grace=None)

    def release_stall(self) -> None:
        """Lets a stalled worker go on."""
        self.settings.is_stalled = False
        self._released.set()

    async def Hello(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("Hello", context)
        if request.epoch <= self._epoch:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"epoch {request.epoch} is not above {self._epoch}",
            )
        last_epoch, self._epoch, self._rank = self._epoch, request.epoch, request.rank
        return worker_pb2.HelloResponse(
            version=self.settings.version,
            model_digest=self.settings.digest or request.model_digest,
            last_epoch=last_epoch,
            phase=worker_pb2.WORKER_PHASE_STARTED,
            pid=os.getpid(),
            pid_start_ticks=start_ticks(os.getpid()) + 1,  # never kill the test process
            boot_id=boot_id(),
            host="fake",
            device="cpu",
            device_uuid=self.settings.device_uuid,
        )

    async def Load(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("Load", context, request.epoch)
        self.config = request.config
        return worker_pb2.LoadResponse(
            local_q_head_count=3,
            local_kv_head_count=1,
            parameter_count=7,
            vocab_size=self.settings.vocab_size,
            block_bytes=64,
        )

    async def CreateGroupId(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("CreateGroupId", context, request.epoch)
        self.meeting_host = request.host
        return worker_pb2.CreateGroupIdResponse(group_id=b"fake")

    async def Join(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("Join", context, request.epoch)
        assert request.group_id == b"fake"
        return worker_pb2.JoinResponse(seconds=0.0)

    async def Preflight(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("Preflight", context, request.epoch)
        path = worker_pb2.PathReport(path="shm", is_usable=True)
        return worker_pb2.PreflightResponse(paths=[path])

    async def Capture(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("Capture", context, request.epoch)
        return worker_pb2.CaptureResponse(max_block_count=self.settings.num_blocks)

    async def InitKvCache(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("InitKvCache", context, request.epoch)
        self._num_blocks = request.block_count
        return worker_pb2.InitKvCacheResponse(kv_cache_bytes=64 * request.block_count)

    async def Execute(
        self, request_iterator: AsyncIterator[worker_pb2.ExecuteRequest], context: object
    ) -> AsyncIterator[worker_pb2.ExecuteResponse]:
        self.calls.append("Execute")
        tables = FakeTables(self.settings, self.config, self._num_blocks, self._rank)
        idle_s = 0.0
        fence = _Fence(self._epoch)
        waiting_since = time.monotonic()
        async for request in request_iterator:
            arrived = time.monotonic()
            command = request.command
            settings = self.settings
            if command.first_step > 1:
                idle_s += arrived - waiting_since
            if settings.is_stalled or command.command_id == settings.stall_at_command:
                await self._released.wait()
            if command.command_id == settings.break_stream_at_command:
                return
            if command.command_id == settings.fail_at_command:
                yield self._failure(command, settings.fail_message, is_refusal=False)
                break
            try:
                if command.command_id == settings.refuse_at_command:
                    raise Refusal("planted refusal")
                fence.check(command)
                delta = worker_pb2.TableDelta.FromString(command.delta)
                tables.apply(delta)
                if command.table_digest and command.table_digest != tables.digest():
                    raise Refusal(f"tables differ at command {command.command_id}")
            except Refusal as refusal:
                yield self._failure(command, str(refusal), is_refusal=True)
                break
            self.commands.append(command)
            if settings.delay_s:
                await asyncio.sleep(settings.delay_s * max(1, command.step_count))
            tables.idle_micros = round(idle_s * 1e6)
            for report in tables.run(command, delta, round(arrived * 1e6)):
                yield report
            waiting_since = time.monotonic()
        async for _ in request_iterator:  # stays until its words are read, as a worker does
            pass

    async def Quiesce(self, request, context):  # type: ignore[no-untyped-def]
        if self.settings.silent_on_quiesce:
            await asyncio.sleep(30)
        await self._enter("Quiesce", context, request.epoch)
        return worker_pb2.QuiesceResponse(last_error=self.settings.last_error, is_drained=True)

    async def DumpFlightRecorder(self, request, context):  # type: ignore[no-untyped-def]
        if self.settings.silent_on_quiesce:
            await asyncio.sleep(30)
        await self._enter("DumpFlightRecorder", context)
        if self.settings.collectives is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "planted")
        return worker_pb2.DumpFlightRecorderResponse(
            collectives=self.settings.collectives, now_nanos=time.monotonic_ns()
        )

    async def Shutdown(self, request, context):  # type: ignore[no-untyped-def]
        self.calls.append("Shutdown")
        self.is_shut_down.set()
        self._released.set()
        self._stopping = asyncio.create_task(self._server.stop(grace=0.05))
        return worker_pb2.ShutdownResponse()

    async def _enter(self, method: str, context, epoch: int | None = None) -> None:  # type: ignore[no-untyped-def]
        self.calls.append(method)
        if method in self.settings.phase_errors:
            await context.abort(*self.settings.phase_errors[method])
        if epoch is not None and epoch != self._epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"epoch {epoch}")

    def _failure(
        self, command: worker_pb2.StepCommand, message: str, *, is_refusal: bool
    ) -> worker_pb2.ExecuteResponse:
        self.settings.last_error = message
        return worker_pb2.ExecuteResponse(
            failure=worker_pb2.RankFailure(
                command_id=command.command_id,
                step=0 if is_refusal else command.first_step,
                is_refusal=is_refusal,
                message=message,
            )
        )


class _Fence:
    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._command_id = 0
        self._step = 0
        self._digest = bytes(8)

    def check(self, command: worker_pb2.StepCommand) -> None:
        require(command.epoch == self._epoch, f"epoch {command.epoch}, not {self._epoch}")
        require(command.command_id == self._command_id + 1, "a gap or repeat")
        require(command.first_step == self._step + 1, "steps have a gap")
        chained = hashlib.blake2b(self._digest + command.delta, digest_size=32).digest()[:8]
        require(command.digest == chained, "another digest")
        self._command_id, self._digest = command.command_id, chained
        self._step += command.step_count
