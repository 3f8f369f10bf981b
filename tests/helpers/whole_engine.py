"""The whole engine in this process, over fake ranks; its frontends are the test behind a socket."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from coordinator.config import CoordinatorConfig
from coordinator.engine import Engine
from coordinator.frontend_link import FrontendProcess, open_link
from coordinator.metrics import EngineMetrics
from lockstep.daemon.notify import Notifier
from protos.lockstep.v1 import engine_pb2
from tests.helpers.engine_harness import LIMIT_S, MODEL, Heard, make_config
from tests.helpers.fake_worker import FakeSettings, FakeWorker


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
            return
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
