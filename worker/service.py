"""WorkerService: the coordinator's calls, checked for their epoch, run on the device thread."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import grpc

from lockstep.daemon.process_identity import boot_id, start_ticks
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import worker_pb2, worker_pb2_grpc
from worker.collective_watch import CollectiveWatch
from worker.device_thread import DeviceThread
from worker.errors import CheckpointError, PhaseError, UnsupportedModel, WorkerError
from worker.execute_stream import ExecuteStream
from worker.metrics import WorkerMetrics
from worker.rank_contract import Rank

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
Context: TypeAlias = Any  # grpc.aio.ServicerContext; grpc carries no types
_DRAIN_LIMIT_S = 1.5
_LAST_WORDS_LIMIT_S = 1.0
_RESET_LIMIT_S = 2.5  # with _DRAIN_LIMIT_S less than a coordinator waits for Hello


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """One rank behind gRPC. Handlers run on the event loop and never touch the device."""

    def __init__(
        self,
        rank: Rank,
        model_digest: str,
        metrics: WorkerMetrics,
        on_shutdown: Callable[[str], None],
    ) -> None:
        self._rank = rank
        self._digest = model_digest
        self._metrics = metrics
        self._on_shutdown = on_shutdown
        self._device_thread = DeviceThread("device", rank.enter_thread)
        self._results_thread = DeviceThread("results", rank.enter_thread)
        self._collectives = CollectiveWatch(rank, metrics)
        self._epoch = 0
        self._greeting: worker_pb2.HelloRequest | None = None
        self._epoch_before = 0
        self._stream: ExecuteStream | None = None
        self._last_error = ""
        self._is_in_phase = False

    @property
    def epoch(self) -> int:
        """The last epoch that was taken; 0 before the first."""
        return self._epoch

    async def Hello(
        self, request: worker_pb2.HelloRequest, context: Context
    ) -> worker_pb2.HelloResponse:
        # The answer to a Hello may be late or lost: until a phase follows, it may come again.
        is_repeated = request == self._greeting
        last_epoch = self._epoch_before if is_repeated else self._epoch
        if request.version != __version__:
            await _refuse(
                context, f"coordinator is version {request.version}, worker {__version__}"
            )
        if request.model_digest != self._digest:
            await _refuse(
                context,
                f"coordinator's checkpoint has digest {request.model_digest[:16]}, the worker's"
                f" {self._digest[:16]}: --model must name the same files on every host",
            )
        if request.epoch <= last_epoch:
            await _refuse(context, f"epoch {request.epoch} is not above {last_epoch}")
        self._greeting, self._epoch_before, self._epoch = request, last_epoch, request.epoch
        await self._leave_epoch(context)
        self._rank.rank, self._rank.world_size = request.rank, request.world_size
        self._metrics.set_rank(request.rank)
        self._metrics.set_phase(self._rank.phase)
        return self._hello_response(last_epoch)

    async def Load(
        self, request: worker_pb2.LoadRequest, context: Context
    ) -> worker_pb2.LoadResponse:
        return await self._phase(request.epoch, context, self._rank.load, request.config)

    async def CreateGroupId(
        self, request: worker_pb2.CreateGroupIdRequest, context: Context
    ) -> worker_pb2.CreateGroupIdResponse:
        group_id = await self._phase(
            request.epoch, context, self._rank.create_group_id, request.host
        )
        return worker_pb2.CreateGroupIdResponse(group_id=group_id)

    async def Join(
        self, request: worker_pb2.JoinRequest, context: Context
    ) -> worker_pb2.JoinResponse:
        seconds = await self._phase(
            request.epoch, context, self._rank.join, request.group_id, request.timeout_seconds
        )
        return worker_pb2.JoinResponse(seconds=seconds)

    async def Preflight(
        self, request: worker_pb2.PreflightRequest, context: Context
    ) -> worker_pb2.PreflightResponse:
        response = await self._phase(
            request.epoch, context, self._rank.preflight, request.timeout_seconds
        )
        self._metrics.set_paths(response)
        return response

    async def Capture(
        self, request: worker_pb2.CaptureRequest, context: Context
    ) -> worker_pb2.CaptureResponse:
        return await self._phase(request.epoch, context, self._rank.capture)

    async def InitKvCache(
        self, request: worker_pb2.InitKvCacheRequest, context: Context
    ) -> worker_pb2.InitKvCacheResponse:
        num_bytes = await self._phase(
            request.epoch, context, self._rank.init_kv_cache, request.block_count, request.epoch
        )
        self._metrics.set_memory(self._rank.memory_bytes)
        return worker_pb2.InitKvCacheResponse(kv_cache_bytes=num_bytes)

    async def Execute(
        self, request_iterator: AsyncIterator[worker_pb2.ExecuteRequest], context: Context
    ) -> AsyncIterator[worker_pb2.ExecuteResponse]:
        executor = self._rank.executor
        if executor is None or self._stream is not None:
            why = "the worker is not ready" if executor is None else "a stream is open already"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
            raise AssertionError("abort raises")
        stream = ExecuteStream(
            self._rank,
            executor,
            self._device_thread,
            self._results_thread,
            self._metrics,
            self._collectives,
        )
        self._stream = stream
        receiver = asyncio.create_task(stream.receive(request_iterator))
        try:
            async for report in stream.reports():
                yield report
            # Until the coordinator has read why, it may still write; a write that meets an ended
            # stream would cost it what it has not read yet (grpc/grpc#36066).
            await asyncio.wait([receiver], timeout=_LAST_WORDS_LIMIT_S)
        finally:
            receiver.cancel()
            with suppress(asyncio.CancelledError, grpc.aio.AbortError):
                await receiver
            if stream.last_error:
                self._fail(stream.last_error)

    async def Quiesce(
        self, request: worker_pb2.QuiesceRequest, context: Context
    ) -> worker_pb2.QuiesceResponse:
        await self._check_epoch(request.epoch, context)
        last_step = self._stream.last_step if self._stream else 0
        if self._stream is not None and self._stream.last_error:
            self._fail(self._stream.last_error)
        drained = await self._abandon()
        return worker_pb2.QuiesceResponse(
            last_error=self._last_error, last_step=last_step, is_drained=drained
        )

    async def DumpFlightRecorder(
        self, request: worker_pb2.DumpFlightRecorderRequest, context: Context
    ) -> worker_pb2.DumpFlightRecorderResponse:
        try:
            return await self._collectives.read()
        except self._rank.foreseen_errors as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))
            raise AssertionError("abort raises") from error

    async def Shutdown(
        self, request: worker_pb2.ShutdownRequest, context: Context
    ) -> worker_pb2.ShutdownResponse:
        # What runs may end in peace; only what hangs is cut.
        if not await self._device_thread.drained(_DRAIN_LIMIT_S):
            self._rank.abort()
        self._on_shutdown(request.reason)
        return worker_pb2.ShutdownResponse()

    async def watch_collectives(self) -> None:
        """Reads what the rank records of its collectives, now and then, until cancelled."""
        await self._collectives.run()

    def stalled_s(self) -> float:
        """Seconds for which a step, or a phase whose caller has given up, has been running.

        A phase that is waited for has its caller's deadline and does not count.
        """
        if self._is_in_phase:
            return 0.0
        return max(self._device_thread.busy_s(), self._results_thread.busy_s())

    def summary(self) -> str:
        """One line for people: rank, start-up phase, the first error of the epoch."""
        phase = worker_pb2.WorkerPhase.Name(self._rank.phase).removeprefix("WORKER_PHASE_").lower()
        text = f"rank {self._rank.rank} of {self._rank.world_size}: {phase}"
        return f"{text}: {self._last_error}" if self._last_error else text

    def close(self) -> None:
        """Lets go of the device: hung collectives end, threads are not waited for."""
        self._rank.abort()
        self._device_thread.close()
        self._results_thread.close()
        self._collectives.close()

    async def _phase(
        self, epoch: int, context: Context, call: Callable[..., T], *args: object
    ) -> T:
        """Runs a phase on the device thread and turns its error into a status."""
        await self._check_epoch(epoch, context)
        self._greeting = None
        ran = asyncio.wrap_future(self._device_thread.submit(call, *args))
        self._is_in_phase = True
        try:
            await asyncio.wait([ran])
        finally:
            self._is_in_phase = False
        error = ran.exception()
        if error is not None:
            _LOG.error(
                "%s failed",  # the coordinator's line says why
                call.__name__,
                exc_info=None if _is_foreseen(error) else error,
                extra={"rank": self._rank.rank, "epoch": epoch},
            )
            self._fail(f"{call.__name__}: {_describe(error)}")
            await context.abort(_status(error), f"{call.__name__}: {_describe(error)}")
        result = ran.result()
        self._metrics.set_phase(self._rank.phase)
        self._metrics.set_memory(self._rank.memory_bytes)
        return result

    async def _check_epoch(self, epoch: int, context: Context) -> None:
        if epoch != self._epoch:
            await _refuse(context, f"call of epoch {epoch}, this worker is in {self._epoch}")

    async def _leave_epoch(self, context: Context) -> None:
        """Drops what an earlier epoch left, but for the weights.

        Ends the worker, to be started again, if that takes long: gloo waits out its own limit for a
        peer whose end it has not heard of.
        """
        if self._rank.is_joined:
            await self._abandon()
            self._stream = None  # it holds the graphs, which must go before the communicator
            reset = asyncio.wrap_future(self._device_thread.submit(self._rank.reset))
            done, _ = await asyncio.wait([reset], timeout=_RESET_LIMIT_S)
            if not done:
                reason = "the communicator of the last epoch does not close"
                self._on_shutdown(reason)
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"{reason}: this worker ends")
            reset.result()
        self._stream = None
        self._last_error = ""

    async def _abandon(self) -> bool:
        """Aborts collectives and ends the stream; says whether the device thread is idle."""
        if self._stream is not None:
            self._stream.fail("the coordinator abandoned the epoch")
        self._rank.abort()
        return await self._device_thread.drained(_DRAIN_LIMIT_S)

    def _fail(self, message: str) -> None:
        self._last_error = self._last_error or message
        self._rank.phase = worker_pb2.WORKER_PHASE_FAILED
        self._metrics.set_phase(self._rank.phase)

    def _hello_response(self, last_epoch: int) -> worker_pb2.HelloResponse:
        device_name, device_uuid = self._rank.device_identity()
        return worker_pb2.HelloResponse(
            version=__version__,
            model_digest=self._digest,
            last_epoch=last_epoch,
            phase=self._rank.phase,
            pid=os.getpid(),
            pid_start_ticks=start_ticks(os.getpid()),
            boot_id=boot_id(),
            host=socket.gethostname(),
            device=device_name,
            device_uuid=device_uuid,
            last_error=self._last_error,
        )


async def _refuse(context: Context, message: str) -> None:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)


def _is_foreseen(error: BaseException) -> bool:
    return isinstance(error, WorkerError)


def _describe(error: BaseException) -> str:
    return str(error) if _is_foreseen(error) else f"{type(error).__name__}: {error}"


def _status(error: BaseException) -> grpc.StatusCode:
    if isinstance(error, CheckpointError | UnsupportedModel):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, PhaseError):
        return grpc.StatusCode.FAILED_PRECONDITION
    return grpc.StatusCode.INTERNAL
