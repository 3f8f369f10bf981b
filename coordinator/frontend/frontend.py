"""The life of a frontend process: load, bind, serve, and the three ways it ends."""

import asyncio
import contextlib
import enum
import gc
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from coordinator.frontend.api_keys import ApiKeys
from coordinator.frontend.availability import Availability
from coordinator.frontend.callers import Callers, CallGuard
from coordinator.frontend.checkpoint_text import CheckpointText
from coordinator.frontend.config import FrontendConfig
from coordinator.frontend.engine_link import EngineLink
from coordinator.frontend.errors import EngineLost
from coordinator.frontend.generate_service import GenerateService
from coordinator.frontend.health import HealthService
from coordinator.frontend.request_preparer import RequestPreparer
from coordinator.frontend.server import (
    ConnectionLimits,
    bind,
    build_server,
    raise_file_limit,
    server_credentials,
)
from coordinator.frontend.slow_clients import SlowClientWatch
from coordinator.frontend.tracing import Tracer, make_tracer
from coordinator.frontend.vllm_service import VllmService
from lockstep.daemon.security_flags import public_tls
from lockstep.daemon.tls_files import ReloadedTls
from protos.lockstep.v1 import engine_pb2

# For the last messages of streams that have just been ended to reach their clients.
_FLUSH_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Ending(enum.Enum):
    """Why a frontend stopped serving."""

    DRAINED = enum.auto()
    ENGINE_ENDED = enum.auto()
    ENGINE_SILENT = enum.auto()


@dataclass(frozen=True)
class PublicAccess:
    """What clients meet at the public port; None: no TLS, no API keys."""

    tls: ReloadedTls | None
    api_keys: ApiKeys | None

    @classmethod
    def read(cls, config: FrontendConfig) -> Self:
        """Reads the files. Raises FlagError, TlsFileError, ApiKeysError."""
        files = public_tls(config.tls_cert, config.tls_key, config.tls_client_ca)
        return cls(
            None if files is None else ReloadedTls(files, is_server=True),
            ApiKeys(Path(config.api_keys)) if config.api_keys else None,
        )


class Frontend:
    """One frontend over one socket to the engine. Made and run on one event loop.

    Whoever made `tracer` closes it.
    """

    def __init__(
        self,
        config: FrontendConfig,
        text: CheckpointText,
        access: PublicAccess,
        executor: ThreadPoolExecutor,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        tracer: Tracer | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._told_to_drain: asyncio.Future[engine_pb2.Drain] = loop.create_future()
        self._health = HealthService()
        self._availability = Availability(self._health)
        self._link = EngineLink(
            reader, writer, config.silence_timeout, self._availability.update, self._on_drain
        )
        callers = Callers(access.api_keys)
        preparer = RequestPreparer(text, self._availability, config.served_model_name, executor)
        self._slow_clients = SlowClientWatch(config.slow_client_seconds)
        self._service = GenerateService(
            self._link,
            self._availability,
            preparer,
            text.model_response(config.served_model_name),
            self._slow_clients,
            callers,
            tracer,
        )
        gateway = VllmService(
            self._service,
            self._availability,
            text,
            config.served_model_name,
            self._slow_clients,
        )
        guard = CallGuard(callers, self._link.count_turned_away)
        self._server = build_server(
            (self._service.handler(), gateway.handler(self._link.report_rejected)),
            self._health,
            config.num_frontends,
            ConnectionLimits(config.max_connections, config.max_concurrent_streams),
            # Without keys there is nobody to turn away: calls need not pass through a guard.
            interceptors=(guard,) if access.api_keys is not None else (),
        )
        credentials = None if access.tls is None else server_credentials(access.tls)
        self.port = bind(self._server, config.host, config.port, config.num_frontends, credentials)

    async def serve(self) -> Ending:
        """Serves until drained or until the engine is lost; returns with the port closed."""
        await self._server.start()
        self._link.report_listening(self.port)
        linked = asyncio.create_task(self._link.run())
        watching = asyncio.create_task(self._slow_clients.run())
        try:
            ends: set[asyncio.Future[Any]] = {linked, self._told_to_drain}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not linked.done():
                await self._drain(linked, self._told_to_drain.result())
            return _ending_of(linked)
        finally:
            linked.cancel()
            watching.cancel()
            await asyncio.gather(linked, watching, return_exceptions=True)
            await self._stop_serving()

    def _on_drain(self, drain: engine_pb2.Drain) -> None:
        """Readiness goes off before anything else, while the message is being handled."""
        self._availability.withdraw()
        if not self._told_to_drain.done():
            self._told_to_drain.set_result(drain)

    async def _drain(self, linked: asyncio.Task[None], drain: engine_pb2.Drain) -> None:
        await asyncio.wait({linked}, timeout=drain.pause_seconds)
        self._availability.start_draining()
        budget_s = drain.budget_seconds
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
    """Runs a frontend on `engine_socket`.

    Raises BadCheckpoint, AddressUnavailable, FlagError, TlsFileError, ApiKeysError,
    TracingUnavailable.
    """
    started = time.monotonic()
    access = PublicAccess.read(config)
    raise_file_limit(config.max_connections)
    tracer = make_tracer(config.otlp_endpoint, config.served_model_name)
    text = CheckpointText.load(config.model)
    gc.collect()
    gc.freeze()  # what lives as long as the process need not be looked at again
    with (
        contextlib.closing(tracer) if tracer is not None else contextlib.nullcontext(),
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise") as executor,
    ):
        reader, writer = await asyncio.open_unix_connection(sock=engine_socket)
        frontend = Frontend(config, text, access, executor, reader, writer, tracer)
        _log.info(
            "listening on %s:%d (%s, %s) after %.1f s",
            config.host,
            frontend.port,
            "TLS" if access.tls else "no TLS",
            "API keys" if access.api_keys else "no API keys",
            time.monotonic() - started,
        )
        return await frontend.serve()
