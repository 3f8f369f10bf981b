"""The whole engine over fake ranks; its frontends are this test behind a socket."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.config import CoordinatorConfig
from coordinator.engine import Engine
from coordinator.frontend_link import FrontendProcess, frontend_command, open_link
from coordinator.metrics import EngineMetrics
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.notify import Notifier
from protos.lockstep.v1 import engine_pb2
from tests.helpers.engine_harness import LIMIT_S, MODEL, Heard, make_config, make_submit
from tests.helpers.fake_worker import FakeSettings, FakeWorker, expected_output
from tests.helpers.notify_socket import NotifySocket


class FakeFrontend:
    """A frontend process whose other end of the socket is here; it is its own Process."""

    def __init__(self, index: int, port: int, reader: Any, writer: Any) -> None:
        self.index = index
        self.port = port
        self.heard = Heard()
        self.was_killed = False
        self._reader = reader
        self._writer = writer
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        if self._ended.done():
            raise ProcessLookupError
        self.was_killed = True
        self.end(-signal.SIGKILL)

    def end(self, return_code: int) -> None:
        """The process ends."""
        if not self._ended.done():
            self._ended.set_result(return_code)
        self._writer.close()
        self._reading.cancel()

    def send(self, **message: Any) -> None:
        payload = engine_pb2.FrontendMessage(**message).SerializeToString()
        self._writer.write(len(payload).to_bytes(4, "little") + payload)

    async def _read(self) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                length = int.from_bytes(await self._reader.readexactly(4), "little")
                payload = await self._reader.readexactly(length)
                self.heard.hear(engine_pb2.EngineMessage.FromString(payload))


class Running:
    """An engine in this process, its ranks and its frontends."""

    def __init__(self) -> None:
        self.frontends: list[FakeFrontend] = []
        self.workers: list[FakeWorker] = []
        self.metrics = EngineMetrics("fake")
        self.task: asyncio.Task[int]
        self.engine: Engine
        self._started = asyncio.Event()

    async def start_frontend(
        self,
        index: int,
        config: CoordinatorConfig,
        port: int,
        take_message: Callable[[int, engine_pb2.FrontendMessage], None],
    ) -> FrontendProcess:
        ours, theirs = socket.socketpair()
        link = await open_link(index, ours, take_message)
        reader, writer = await asyncio.open_connection(sock=theirs)
        frontend = FakeFrontend(index, port, reader, writer)
        self.frontends.append(frontend)
        self._started.set()
        return FrontendProcess(link, frontend)

    async def frontend(self, index: int = 0) -> FakeFrontend:
        async with asyncio.timeout(LIMIT_S):
            while len(self.frontends) <= index:
                self._started.clear()
                await self._started.wait()
        return self.frontends[index]

    async def ready(self) -> FakeFrontend:
        """The first frontend, listening, once it has been told that the group is ready."""
        first = await self.frontend()
        first.send(listening=engine_pb2.Listening(port=4711))
        await first.heard.until(
            lambda: bool(first.heard.states) and first.heard.states[-1].is_ready
        )
        return first

    async def result(self) -> int:
        async with asyncio.timeout(LIMIT_S):
            return await self.task


@asynccontextmanager
async def running_engine(notifier: Notifier | None = None, **config: Any) -> AsyncIterator[Running]:
    running = Running()
    running.workers = [FakeWorker(FakeSettings(num_blocks=256)) for _ in range(2)]
    addresses = [await worker.serve() for worker in running.workers]
    engine = Engine(
        make_config(addresses, **config),
        MODEL,
        "digest",
        running.metrics,
        9999,
        running.start_frontend,
        notifier,
    )
    running.engine = engine
    running.task = asyncio.create_task(engine.run())
    try:
        yield running
    finally:
        running.task.cancel()
        with suppress(asyncio.CancelledError):
            await running.task
        for frontend in running.frontends:
            frontend.end(0)
        for worker in running.workers:
            await worker.stop()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)


def test_requests_of_several_frontends_get_their_own_tokens() -> None:
    async def run() -> None:
        async with running_engine(num_frontends=2) as running:
            first = await running.ready()
            second = await running.frontend(1)
            assert (first.port, second.port) == (50051, 4711)
            second.send(listening=engine_pb2.Listening(port=4711))
            for frontend, start in ((first, 1), (second, 2)):
                submit = make_submit(1, [start], 9, request_id=str(start))
                frontend.send(submit=submit)
            for frontend, start in ((first, 1), (second, 2)):
                await frontend.heard.end_of(1)
                assert frontend.heard.tokens[1] == expected_output([start], 9)

    asyncio.run(run())


def test_abort_reaches_another_frontends_request() -> None:
    async def run() -> None:
        async with running_engine(num_frontends=2) as running:
            first = await running.ready()
            second = await running.frontend(1)
            first.send(submit=make_submit(1, [1], 250, request_id="long"))
            second.send(abort=engine_pb2.AbortByName(query=5, request_id="long"))
            await second.heard.until(lambda: bool(second.heard.outcomes))
            assert second.heard.outcomes[0].query == 5
            if second.heard.outcomes[0].was_active:
                await first.heard.end_of(1)

    asyncio.run(run())


def test_a_request_that_its_frontend_has_lost_is_seen_until_it_ends() -> None:
    async def run() -> None:
        async with running_engine() as running:
            first = await running.ready()
            first.send(submit=make_submit(1, [1], 250))
            first.send(alive=engine_pb2.Alive(stream_count=0))  # it has forgotten the request
            first.send(abort=engine_pb2.AbortByName(query=1, request_id="no such"))
            await first.heard.until(lambda: bool(first.heard.outcomes))
            assert running.metrics.requests_without_client == 1
            first.send(release=engine_pb2.Release(handle=1, reason="cancelled"))
            first.send(alive=engine_pb2.Alive(stream_count=0))
            await first.heard.end_of(1)
            first.send(abort=engine_pb2.AbortByName(query=2, request_id="no such"))
            await first.heard.until(lambda: len(first.heard.outcomes) == 2)
            assert running.metrics.requests_without_client == 0

    asyncio.run(run())


def test_before_the_group_is_up_requests_are_refused_as_unavailable() -> None:
    async def run() -> None:
        async with running_engine() as running:
            for worker in running.workers:
                await worker.stop()
            first = await running.frontend()
            first.send(submit=make_submit(1, [1], 2))
            await first.heard.end_of(1)
            assert first.heard.ended[1][0].status_code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert "not ready" in first.heard.ended[1][0].status_message
            assert not first.heard.states[0].is_ready

    asyncio.run(run())


def test_the_state_comes_at_least_once_a_second_and_tells_the_ranks() -> None:
    async def run() -> None:
        async with running_engine() as running:
            first = await running.ready()
            seen = len(first.heard.states)
            await first.heard.until(lambda: len(first.heard.states) >= seen + 2, limit_s=2.5)
            state = first.heard.states[-1]
            assert (state.max_model_len, state.vocab_size) == (512, 1000)
            assert [rank.address for rank in state.server.ranks] == [
                worker.address for worker in running.workers
            ]
            assert all(rank.is_up and rank.pid == os.getpid() for rank in state.server.ranks)
            assert (state.server.block_count, state.server.block_size) == (256, 4)

    asyncio.run(run())


def test_the_ready_file_says_where_once_the_model_can_answer(tmp_path: Path) -> None:
    async def run() -> None:
        ready_file = tmp_path / "ready.json"
        async with running_engine(ready_file=str(ready_file)) as running:
            await running.frontend()
            assert not ready_file.exists()
            await running.ready()
            async with asyncio.timeout(LIMIT_S):
                while not ready_file.exists():
                    await asyncio.sleep(0.005)
            told = json.loads(ready_file.read_text())
            assert (told["role"], told["rank"]) == ("coordinator", None)
            assert (told["grpc"], told["metrics"]) == ("127.0.0.1:4711", "127.0.0.1:9999")

    asyncio.run(run())


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


async def until_heard(manager: NotifySocket, beginning: str) -> None:
    """Waits until the service manager hears such a message that it has not heard yet."""
    async with asyncio.timeout(LIMIT_S):
        while not any(message.startswith(beginning) for message in manager.read()):
            await asyncio.sleep(0.002)


def test_the_watchdog_is_fed_only_while_steps_progress_and_again_after_a_stall() -> None:
    async def run() -> None:
        environ = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "200000"}  # a stall: 50 ms
        with Notifier(environ) as notifier:
            async with running_engine(notifier, step_timeout=60.0) as running:
                first = await running.frontend()
                await until_heard(manager, "STATUS=starting")
                assert "READY=1" not in manager.messages
                first.send(listening=engine_pb2.Listening(port=4711))
                await until_heard(manager, "READY=1")
                await until_heard(manager, "WATCHDOG=1")

                running.workers[1].settings.is_stalled = True
                first.send(submit=make_submit(1, [1], 20))
                async with asyncio.timeout(LIMIT_S):
                    while running.engine._status.stalled_s() < 0.1:
                        await asyncio.sleep(0.01)
                manager.read()
                async with asyncio.timeout(LIMIT_S):
                    while running.engine._status.stalled_s() < 0.5:
                        assert "WATCHDOG=1" not in manager.read()
                        await asyncio.sleep(0.01)

                running.workers[1].release_stall()
                await until_heard(manager, "WATCHDOG=1")
                os.kill(os.getpid(), signal.SIGTERM)
                await until_heard(manager, "STOPPING=1")
                assert any(m.startswith("STATUS=serving fake on 2 rank") for m in manager.messages)
                first.end(0)
                assert await running.result() == ExitCode.CLEAN

    with NotifySocket() as manager:
        asyncio.run(run())


def test_the_service_manager_is_told_why_the_group_cannot_answer() -> None:
    async def run() -> None:
        environ = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "200000"}
        with Notifier(environ) as notifier:
            async with running_engine(notifier) as running:
                first = await running.ready()
                first.send(submit=make_submit(1, [1], 2))
                await running.workers[1].stop()
                async with asyncio.timeout(LIMIT_S):
                    while not any("rank 1 lost" in message for message in manager.messages):
                        manager.read()
                        await asyncio.sleep(0.002)
                # A group that starts again owes nothing: its start has limits of its own.
                await until_heard(manager, "WATCHDOG=1")

    with NotifySocket() as manager:
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


def test_rejections_of_frontends_are_counted() -> None:
    async def run() -> None:
        async with running_engine() as running:
            first = await running.ready()
            first.send(rejected=engine_pb2.Rejected(reason="invalid_argument", count=3))
            first.send(submit=make_submit(1, [1], 1))
            await first.heard.end_of(1)
            assert running.metrics.requests_rejected == {"invalid_argument": 3}

    asyncio.run(run())


def test_a_frontend_is_started_as_it_expects() -> None:
    config = make_config(["a:1"], model=Path("/m"), step_timeout=9.0, num_frontends=2)
    words = list(frontend_command(config, 7, 1234))
    assert words[1:3] == ["-m", "coordinator.frontend"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert flags == {
        "--engine-fd": "7",
        "--engine-pid": str(os.getpid()),
        "--model": "/m",
        "--served-model-name": "fake",
        "--host": "127.0.0.1",
        "--port": "1234",
        "--silence-timeout": "11.0",
        "--num-frontends": "2",
        "--slow-client-seconds": "30.0",
        "--tls-cert": "",
        "--tls-key": "",
        "--tls-client-ca": "",
        "--api-keys": "",
        "--max-connections": "4096",
        "--max-concurrent-streams": "2048",
        "--log-format": "text",
    }
