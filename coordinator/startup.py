"""From N addresses to a group that can answer: the start-up phases, each timed and limited.

Hello -> Load -> CreateGroupId -> Join -> Preflight -> Capture -> InitKvCache. Every phase is called
on all ranks at once, every rank's answer is kept, and answers that must agree are compared.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from coordinator.agreement import agreed, check_hellos, check_preflights, choose_comm
from coordinator.config import CoordinatorConfig
from coordinator.errors import RankLost, StartRefused
from coordinator.model_config import ModelConfig, served_max_model_len, table_width
from coordinator.worker_group import WorkerClient
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import worker_pb2

_LOG = logging.getLogger(__name__)
_HELLO_TIMEOUT_S = 5.0
_DIAL_PERIOD_S = 0.2
_JOIN_TIMEOUT_S = 120.0
_PREFLIGHT_TIMEOUT_S = 60.0
_OTHERS_WAIT_S = 1.0
_STILL_PERIOD_S = 10.0


class PhaseObserver(Protocol):
    """Is told how the start goes: for logs, metrics and health."""

    def phase_began(self, phase: str) -> None: ...

    def phase_ended(self, phase: str, seconds: float) -> None: ...


@dataclass(frozen=True)
class Group:
    """A group that can answer. Lists are by rank; `num_blocks` counts the dummy.

    `memory_bytes` is what each rank's device holds, by kind.
    """

    epoch: int
    hellos: Sequence[worker_pb2.HelloResponse]
    loads: Sequence[worker_pb2.LoadResponse]
    num_blocks: int
    max_model_len: int
    vocab_size: int
    engine_config: worker_pb2.EngineConfig
    preflight: worker_pb2.PreflightResponse
    memory_bytes: Sequence[Mapping[str, int]]


@dataclass(frozen=True)
class RecordedGroup:
    """What a step log wants to find again. `comm` of the config may be "auto"."""

    engine_config: worker_pb2.EngineConfig
    num_blocks: int


class Startup:
    """One start of the group under one epoch."""

    def __init__(
        self,
        workers: Sequence[WorkerClient],
        epoch: int,
        config: CoordinatorConfig,
        model: ModelConfig,
        model_digest: str,
        observer: PhaseObserver,
        is_restart: bool = False,
        recorded: RecordedGroup | None = None,
    ) -> None:
        """With `recorded`, that decides instead of `config` and of what fits."""
        self._recorded = recorded
        self._is_restart = is_restart
        self._workers = workers
        self._epoch = epoch
        self._config = config
        self._model = model
        self._digest = model_digest
        self._observer = observer
        self._deadline = time.monotonic() + config.startup_timeout
        self.hellos: Sequence[worker_pb2.HelloResponse] = []

    async def run(self) -> Group:
        """Runs all phases. Raises StartRefused for what a retry cannot mend, RankLost otherwise."""
        hellos = await self._timed("hello", self._hello_all())
        self.hellos = hellos
        check_hellos(hellos, self._workers, self._digest)
        engine_config = self._engine_config(hellos)
        loads = await self._phase(
            "load",
            "Load",
            worker_pb2.LoadRequest(epoch=self._epoch, config=engine_config),
            worker_pb2.LoadResponse,
        )
        vocab_size = agreed("vocab_size", [load.vocab_size for load in loads])
        await self._timed("join", self._join())
        preflights = await self._phase(
            "preflight",
            "Preflight",
            worker_pb2.PreflightRequest(
                epoch=self._epoch, timeout_seconds=min(_PREFLIGHT_TIMEOUT_S, self._remaining())
            ),
            worker_pb2.PreflightResponse,
        )
        check_preflights(preflights)
        captures = await self._phase(
            "capture",
            "Capture",
            worker_pb2.CaptureRequest(epoch=self._epoch),
            worker_pb2.CaptureResponse,
        )
        agreed("padded_sizes", [tuple(capture.padded_sizes) for capture in captures])
        num_blocks = self._num_blocks(captures)
        max_model_len = served_max_model_len(self._config, self._model, num_blocks)
        caches = await self._phase(
            "init_kv_cache",
            "InitKvCache",
            worker_pb2.InitKvCacheRequest(epoch=self._epoch, block_count=num_blocks),
            worker_pb2.InitKvCacheResponse,
        )
        memory = [
            {**capture.memory_bytes, "kv": cache.kv_cache_bytes}
            for capture, cache in zip(captures, caches, strict=True)
        ]
        return Group(
            self._epoch,
            hellos,
            loads,
            num_blocks,
            max_model_len,
            vocab_size,
            engine_config,
            preflights[0],
            memory,
        )

    async def _hello_all(self) -> list[worker_pb2.HelloResponse]:
        return await gather_ranks([self._hello(worker) for worker in self._workers])

    async def _hello(self, worker: WorkerClient) -> worker_pb2.HelloResponse:
        """Dials until the worker answers; says in the log why it does not."""
        told = ""
        request = worker_pb2.HelloRequest(
            version=__version__,
            model_digest=self._digest,
            epoch=self._epoch,
            rank=worker.rank,
            world_size=len(self._workers),
        )
        while True:
            try:
                response: worker_pb2.HelloResponse = await worker.call(
                    "Hello", request, worker_pb2.HelloResponse, _HELLO_TIMEOUT_S
                )
                return response
            except grpc.aio.AioRpcError as error:
                if error.code() not in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                ):
                    raise self._phase_error(worker, "Hello", error) from error
                if self._remaining() <= 0:
                    raise StartRefused(
                        ExitCode.GROUP_LOST,
                        f"rank {worker.rank} at {worker.address} did not answer within "
                        f"--startup-timeout {self._config.startup_timeout:g} s: {error.details()}",
                    ) from error
                if error.details() not in ("", told):
                    told = error.details()
                    _LOG.info("rank %d at %s: %s", worker.rank, worker.address, told)
            await asyncio.sleep(_DIAL_PERIOD_S)

    def _engine_config(self, hellos: Sequence[worker_pb2.HelloResponse]) -> worker_pb2.EngineConfig:
        config = self._config
        if self._recorded is not None:
            wanted = worker_pb2.EngineConfig()
            wanted.CopyFrom(self._recorded.engine_config)
            wanted.comm = choose_comm(hellos, wanted.comm)
            return wanted
        dtype = self._model.dtype if config.dtype == "auto" else config.dtype
        return worker_pb2.EngineConfig(
            dtype=dtype,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            max_model_len=table_width(config, self._model),
            load_format=config.load_format,
            comm=choose_comm(hellos, config.comm),
            gpu_memory_fraction=config.gpu_memory_fraction,
            kv_cache_bytes=config.kv_cache_bytes,
            use_graphs=config.use_graphs,
        )

    def _num_blocks(self, captures: Sequence[worker_pb2.CaptureResponse]) -> int:
        fitting = [capture.max_block_count for capture in captures]
        if self._recorded is None:
            return min(fitting)
        wanted = self._recorded.num_blocks
        if wanted > min(fitting):
            rank = fitting.index(min(fitting))
            raise StartRefused(
                ExitCode.CONFIG,
                f"the log was recorded with {wanted} KV blocks; rank {rank} has room for "
                f"{fitting[rank]}",
            )
        return wanted

    async def _join(self) -> None:
        made = await self._call_rank(
            self._workers[0],
            "CreateGroupId",
            worker_pb2.CreateGroupIdRequest(
                epoch=self._epoch, host=host_of(self._workers[0].address)
            ),
            worker_pb2.CreateGroupIdResponse,
        )
        request = worker_pb2.JoinRequest(
            epoch=self._epoch,
            group=self._epoch,
            group_id=made.group_id,
            timeout_seconds=min(_JOIN_TIMEOUT_S, self._remaining()),
        )
        await self._call_all("Join", request, worker_pb2.JoinResponse)

    async def _phase(self, phase: str, method: str, request: Any, response_type: Any) -> list[Any]:
        answers: list[Any] = await self._timed(
            phase, self._call_all(method, request, response_type)
        )
        return answers

    async def _timed(self, phase: str, work: Any) -> Any:
        self._observer.phase_began(phase)
        begun = time.monotonic()
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([task], timeout=_STILL_PERIOD_S))[0]:
                _LOG.info("still in phase %s after %.0f s", phase, time.monotonic() - begun)
            answer = task.result()
        finally:
            task.cancel()
        self._observer.phase_ended(phase, time.monotonic() - begun)
        return answer

    async def _call_all(self, method: str, request: Any, response_type: Any) -> list[Any]:
        return await gather_ranks(
            [self._call_rank(worker, method, request, response_type) for worker in self._workers]
        )

    async def _call_rank(
        self, worker: WorkerClient, method: str, request: Any, response_type: Any
    ) -> Any:
        try:
            return await worker.call(method, request, response_type, max(self._remaining(), 0.1))
        except grpc.aio.AioRpcError as error:
            raise self._phase_error(worker, method, error) from error

    def _phase_error(
        self, worker: WorkerClient, method: str, error: grpc.aio.AioRpcError
    ) -> Exception:
        """StartRefused for what the worker foresaw and a retry cannot mend; else RankLost."""
        code, details = error.code(), error.details() or ""
        where = f"rank {worker.rank} at {worker.address}, {method}: {details}"
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            return StartRefused(ExitCode.CHECKPOINT, where)
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            # Hello's two refusals differ in nothing but their words.
            is_checkpoint = method == "Hello" and "digest" in details
            return StartRefused(ExitCode.CHECKPOINT if is_checkpoint else ExitCode.CONFIG, where)
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return StartRefused(ExitCode.CONFIG, where)
        if code is grpc.StatusCode.INTERNAL and not self._is_restart:
            # The device or library is missing something. After a lost rank it may only be that the
            # old process has not let go of its memory yet.
            return StartRefused(ExitCode.DEVICE, where)
        return RankLost(worker.rank, 0, f"{method}: {code.name} {details}")

    def _remaining(self) -> float:
        return self._deadline - time.monotonic()


def host_of(address: str) -> str:
    """Of host:port; without the brackets of an IPv6 address."""
    return address.rpartition(":")[0].removeprefix("[").removesuffix("]")


async def gather_ranks(calls: Sequence[Any]) -> list[Any]:
    """Awaits one call a rank, all at once; the first error ends the others.

    A rank that died makes its peers fail too, so the others get a second to fail before the error
    is chosen: a lost rank before one that complains.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            await asyncio.wait(pending, timeout=_OTHERS_WAIT_S)
        errors = [
            error for task in tasks if task.done() and (error := task.exception()) is not None
        ]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for error in sorted(errors, key=lambda error: not isinstance(error, RankLost)):
        raise error
    return [task.result() for task in tasks]
