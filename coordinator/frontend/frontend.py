"""The life of a frontend process: load, bind, serve, and the three ways it ends."""

import asyncio
import enum
import gc
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from coordinator.frontend.availability import Availability
from coordinator.frontend.checkpoint_text import CheckpointText
from coordinator.frontend.config import FrontendConfig
from coordinator.frontend.engine_link import EngineLink
from coordinator.frontend.errors import EngineLost
from coordinator.frontend.generate_service import GenerateService
from coordinator.frontend.health import HealthService
from coordinator.frontend.request_preparer import RequestPreparer
from coordinator.frontend.server import bind, build_server
from coordinator.frontend.slow_clients import SlowClientWatch
from coordinator.frontend.vllm_service import VllmService

# For the last messages of streams that have just been ended to reach their clients.
_FLUSH_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Ending(enum.Enum):
    """Why a frontend stopped serving."""

    DRAINED = enum.auto()
    ENGINE_ENDED = enum.auto()
    ENGINE_SILENT = enum.auto()


class Frontend:
    """One frontend over one socket to the engine. Made and run on one event loop."""

    def __init__(
        self,
        config: FrontendConfig,
        text: CheckpointText,
        executor: ThreadPoolExecutor,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._drain_budget: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._health = HealthService()
        self._availability = Availability(self._health)
        self._link = EngineLink(
            reader, writer, config.silence_timeout, self._availability.update, self._on_drain
        )
        preparer = RequestPreparer(text, self._availability, config.served_model_name, executor)
        self._slow_clients = SlowClientWatch(config.slow_client_seconds)
        self._service = GenerateService(
            self._link,
            self._availability,
            preparer,
            text.model_response(config.served_model_name),
            self._slow_clients,
        )
        self._server = build_server(self._service.handler(), self._health, config.num_frontends)
        gateway = VllmService(
            self._service,
            self._availability,
            text,
            config.served_model_name,
            self._slow_clients,
            executor,
        )
        handler = gateway.handler(self._link.report_rejected)
        self._server.add_generic_rpc_handlers((handler,))
        self.port = bind(self._server, config.host, config.port, config.num_frontends)

    async def serve(self) -> Ending:
        """Serves until drained or until the engine is lost; returns with the port closed."""
        await self._server.start()
        self._link.report_listening(self.port)
        linked = asyncio.create_task(self._link.run())
        watching = asyncio.create_task(self._slow_clients.run())
        try:
            ends: set[asyncio.Future[Any]] = {linked, self._drain_budget}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not linked.done():
                await self._drain(linked, self._drain_budget.result())
            return _ending_of(linked)
        finally:
            linked.cancel()
            watching.cancel()
            await asyncio.gather(linked, watching, return_exceptions=True)
            await self._stop_serving()

    def _on_drain(self, budget_s: float) -> None:
        """Readiness goes off before anything else, while the message is being handled."""
        self._availability.start_draining()
        if not self._drain_budget.done():
            self._drain_budget.set_result(budget_s)

    async def _drain(self, linked: asyncio.Task[None], budget_s: float) -> None:
        _log.info("draining: %d requests, at most %g s", self._link.num_streams, budget_s)
        idle = asyncio.create_task(self._service.wait_until_idle())
        await asyncio.wait({linked, idle}, timeout=budget_s, return_when=asyncio.FIRST_COMPLETED)
        if not idle.done():
            idle.cancel()
            self._link.fail_all(
                EngineLost(f"the server stopped: its drain time of {budget_s:g} s is over")
            )

    async def _stop_serving(self) -> None:
        self._availability.lose_engine("the server has stopped")
        self._health.close()
        await self._server.stop(_FLUSH_SECONDS)
        await self._link.close()


def _ending_of(linked: asyncio.Task[None]) -> Ending:
    if not linked.done():
        return Ending.DRAINED
    error = linked.exception()
    if not isinstance(error, EngineLost):
        linked.result()
        raise AssertionError("the link's run returns only by raising")
    _log.error("%s", error)
    return Ending.ENGINE_SILENT if error.is_silent else Ending.ENGINE_ENDED


async def run_frontend(config: FrontendConfig, engine_socket: socket.socket) -> Ending:
    """Runs a frontend on `engine_socket`. Raises BadCheckpoint, AddressUnavailable."""
    started = time.monotonic()
    text = CheckpointText.load(config.model)
    gc.collect()
    gc.freeze()  # what lives as long as the process need not be looked at again
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise") as executor:
        reader, writer = await asyncio.open_unix_connection(sock=engine_socket)
        frontend = Frontend(config, text, executor, reader, writer)
        _log.info(
            "listening on %s:%d after %.1f s",
            config.host,
            frontend.port,
            time.monotonic() - started,
        )
        return await frontend.serve()
