"""The service around a simulated rank, in this process over TCP, and what cannot end it."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.worker_group import one_by_one
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import worker_pb2, worker_pb2_grpc
from protos.lockstep.v1.worker_pb2 import ExecuteRequest, ExecuteResponse, StepCommand, TableDelta
from tests.helpers import command_fuzz
from tests.helpers.command_maker import CommandMaker
from worker import execute_stream, service
from worker.metrics import WorkerMetrics
from worker.report_queue import ReportQueue
from worker.service import WorkerService
from worker.simulated.config import simulated_config
from worker.simulated.rank import SimulatedRank

_LIMIT_S = 20.0
_DIGEST = "digest"
_CONFIG = worker_pb2.EngineConfig(
    dtype="float32",
    block_size=command_fuzz.BLOCK_SIZE,
    max_num_seqs=command_fuzz.MAX_SEQS,
    max_batch_tokens=64,
    max_model_len=command_fuzz.MAX_MODEL_LEN,
    load_format="safetensors",
    comm="shm",
)


@dataclass
class Served:
    """A simulated rank behind its service; every use of it begins an epoch."""

    channel: grpc.aio.Channel
    stub: Any
    ended: list[str]  # why the service wanted the process to end
    rank: int = 0
    epoch: int = 0
    num_messages: int = 0  # that reports have come in

    def hello(self, epoch: int, **changes: int) -> worker_pb2.HelloRequest:
        """The first message of an epoch."""
        hello = worker_pb2.HelloRequest(
            version=__version__,
            model_digest=_DIGEST,
            epoch=epoch,
            rank=self.rank,
            world_size=self.rank + 1,
        )
        hello.MergeFrom(worker_pb2.HelloRequest(**changes))  # type: ignore[arg-type]
        return hello

    async def new_epoch(self) -> CommandMaker:
        """Takes the rank through all phases."""
        self.epoch += 1
        epoch = self.epoch
        hello = self.hello(epoch)
        blocks = command_fuzz.NUM_BLOCKS
        calls = (
            (self.stub.Hello, hello),
            (self.stub.Load, worker_pb2.LoadRequest(epoch=epoch, config=_CONFIG)),
            (self.stub.Join, worker_pb2.JoinRequest(epoch=epoch, group_id=b"simulated")),
            (self.stub.Preflight, worker_pb2.PreflightRequest(epoch=epoch)),
            (self.stub.Capture, worker_pb2.CaptureRequest(epoch=epoch)),
            (
                self.stub.InitKvCache,
                worker_pb2.InitKvCacheRequest(epoch=epoch, block_count=blocks),
            ),
        )
        for method, request in calls:
            await method(request, timeout=_LIMIT_S)
        return CommandMaker(epoch)

    async def execute(self, commands: Sequence[StepCommand]) -> list[ExecuteResponse]:
        """Reports until a failure, or until the heartbeat that is sent last is answered."""
        stream = self.stub.Execute(timeout=_LIMIT_S)
        for command in commands:
            await stream.write(ExecuteRequest(command=command))
        reports: list[ExecuteResponse] = []
        async for report in stream:
            self.num_messages += 1
            reports += one_by_one(report)
            is_last = report.progress.command_id == commands[-1].command_id
            if report.WhichOneof("report") == "failure" or is_last:
                break
        stream.cancel()
        return reports

    async def quiesce(self) -> worker_pb2.QuiesceResponse:
        request = worker_pb2.QuiesceRequest(epoch=self.epoch)
        response: worker_pb2.QuiesceResponse = await self.stub.Quiesce(request, timeout=_LIMIT_S)
        return response


@asynccontextmanager
async def served(folder: Path, *flags: str) -> AsyncIterator[Served]:
    (folder / "config.json").write_text(json.dumps({"vocab_size": command_fuzz.VOCAB_SIZE}))
    base = ("--model", str(folder), "--step-ms", "0", "--prefill-us", "0")
    rank = SimulatedRank(simulated_config([*base, *flags], {}))
    with WorkerMetrics("simulated", "127.0.0.1", 0) as metrics:
        ended: list[str] = []
        servicer = WorkerService(rank, _DIGEST, metrics, ended.append)
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield Served(channel, worker_pb2_grpc.WorkerServiceStub(channel), ended)
        finally:
            servicer.close()
            await server.stop(grace=None)


def whole_history(maker: CommandMaker) -> list[StepCommand]:
    history = command_fuzz.valid_deltas(random.Random(5))
    commands = [maker.next(delta, steps) for delta, steps in history]
    return [*commands, maker.next(TableDelta(), 0)]


def test_a_hello_may_be_repeated_until_a_phase_follows_and_no_other_of_its_epoch(
    tmp_path: Path,
) -> None:
    async def drive() -> None:
        async with served(tmp_path) as worker:
            await worker.new_epoch()

            async def refused(request: worker_pb2.HelloRequest) -> None:
                with pytest.raises(grpc.aio.AioRpcError, match="is not above"):
                    await worker.stub.Hello(request, timeout=_LIMIT_S)

            await refused(worker.hello(1))
            for _ in range(2):
                answer = await worker.stub.Hello(worker.hello(2), timeout=_LIMIT_S)
                assert answer.last_epoch == 1
            # Another coordinator's, who would begin the same epoch.
            await refused(worker.hello(2, rank=1, world_size=2))
            load = worker_pb2.LoadRequest(epoch=2, config=_CONFIG)
            await worker.stub.Load(load, timeout=_LIMIT_S)
            await refused(worker.hello(2))

    asyncio.run(drive())


def test_a_worker_whose_last_communicator_does_not_close_ends_to_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_closed = threading.Event()
    monkeypatch.setattr(service, "_RESET_LIMIT_S", 0.05)
    monkeypatch.setattr(SimulatedRank, "reset", lambda self: is_closed.wait(_LIMIT_S))

    async def drive() -> None:
        async with served(tmp_path) as worker:
            await worker.new_epoch()
            try:
                with pytest.raises(grpc.aio.AioRpcError, match="this worker ends") as refused:
                    await worker.stub.Hello(worker.hello(2), timeout=_LIMIT_S)
            finally:
                is_closed.set()
            # What the coordinator dials again after.
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert worker.ended == ["the communicator of the last epoch does not close"]

    asyncio.run(drive())


def test_reports_carry_arrival_and_idle_time(tmp_path: Path) -> None:
    async def drive() -> list[ExecuteResponse]:
        async with served(tmp_path, "--step-ms", "3") as worker:
            return await worker.execute(whole_history(await worker.new_epoch()))

    reports = asyncio.run(drive())
    results = [r.result for r in reports if r.WhichOneof("report") == "result"]
    assert [result.step for result in results] == list(range(1, len(results) + 1))
    assert {result.step_micros for result in results} == {3000}
    assert {result.comm_micros for result in results} == {-1}
    arrivals = [result.arrival_micros for result in results]
    assert arrivals[0] > 0 and arrivals == sorted(arrivals)
    idle = [result.idle_micros for result in results]
    assert idle[0] == 0 and idle == sorted(idle)
    # Commands were sent without waiting for results, so they queued up behind steps of 3 ms.
    assert idle[-1] < 3000 * len(results)
    assert reports[-1].progress.idle_micros >= idle[-1]


@pytest.mark.parametrize(("step_ms", "num_messages"), [("1", 3), ("7", 8)])
def test_results_of_quick_steps_travel_together_a_command_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_ms: str, num_messages: int
) -> None:
    monkeypatch.setattr(execute_stream, "ReportQueue", lambda: ReportQueue(_LIMIT_S))

    async def drive() -> None:
        async with served(tmp_path, "--step-ms", step_ms) as worker:
            maker = await worker.new_epoch()
            commands = [maker.next(TableDelta(), steps) for steps in (4, 3, 0)]
            reports = await worker.execute(commands)
            assert [report.result.step for report in reports[:-1]] == list(range(1, 8))
            assert worker.num_messages == num_messages

    asyncio.run(drive())


def test_a_rank_above_0_reports_progress_and_no_tokens(tmp_path: Path) -> None:
    async def drive() -> list[ExecuteResponse]:
        async with served(tmp_path) as worker:
            worker.rank = 1
            return await worker.execute(whole_history(await worker.new_epoch()))

    reports = asyncio.run(drive())
    assert {report.WhichOneof("report") for report in reports} == {"progress"}
    assert reports[-1].progress.step > 10


@pytest.mark.parametrize("seed", range(3))
def test_spoiled_commands_end_as_refusals_and_the_worker_goes_on(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)

    async def drive_one(worker: Served) -> bool:
        maker = await worker.new_epoch()
        history = command_fuzz.valid_deltas(rng)
        at = rng.randrange(len(history))
        commands = [maker.next(delta, steps) for delta, steps in history[:at]]
        commands.append(command_fuzz.spoiled(rng, *history[at], maker))
        commands.append(maker.next(TableDelta(row_count=999), 0))  # refused, if nothing before was
        reports = await worker.execute(commands)
        assert reports[-1].failure.is_refusal, reports[-1]
        quiesced = await worker.quiesce()
        assert quiesced.is_drained and quiesced.last_error == reports[-1].failure.message
        return reports[-1].failure.command_id != commands[-1].command_id

    async def drive() -> list[bool]:
        async with served(tmp_path, "--stop-probability", "0.1") as worker:
            return [await drive_one(worker) for _ in range(25)]

    assert sum(asyncio.run(drive())) > 10


def test_bytes_that_are_no_request_are_refused_and_the_worker_goes_on(tmp_path: Path) -> None:
    async def drive() -> None:
        async with served(tmp_path) as worker:
            await worker.new_epoch()
            call = worker.channel.stream_stream(
                "/lockstep.v1.WorkerService/Execute",
                request_serializer=bytes,
                response_deserializer=ExecuteResponse.FromString,
            )(timeout=_LIMIT_S)
            await call.write(b"\xff\xff\xff")
            reports = [report async for report in call]
            assert [report.failure.is_refusal for report in reports] == [True]
            assert "no ExecuteRequest" in reports[0].failure.message
            assert (await worker.quiesce()).is_drained
            assert await worker.execute(whole_history(await worker.new_epoch()))

    asyncio.run(drive())
