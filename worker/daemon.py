"""A worker process around a rank: metrics, gRPC server, signals, ready file, service manager."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lockstep.daemon.addresses import bind_problem
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.daemon.group_secret import read_group_secret
from lockstep.daemon.notify import Notifier
from lockstep.daemon.ready_file import write_ready_file
from lockstep.daemon.security_flags import group_tls
from lockstep.daemon.tls_files import ReloadedTls, TlsFileError
from protos.lockstep.v1 import worker_pb2_grpc
from worker.config import GroupSettings
from worker.join_guard import JoinGuard, server_credentials
from worker.metrics import WorkerMetrics
from worker.rank_contract import Rank
from worker.service import WorkerService

_LOG = logging.getLogger(__name__)
_MAX_MESSAGE_BYTES = 256 << 20
_OTHER_PORT = "stop what runs there, or choose another --{} (0: any)"


class DaemonConfig(GroupSettings, Protocol):
    """The settings that every worker process has; ports 0 are any."""

    @property
    def model(self) -> Path: ...
    @property
    def port(self) -> int: ...
    @property
    def metrics_host(self) -> str: ...
    @property
    def metrics_port(self) -> int: ...
    @property
    def ready_file(self) -> str: ...


def run_daemon(config: DaemonConfig, rank: Rank, digest: str, notifier: Notifier) -> int:
    """Serves `rank`, whose checkpoint has `digest`, until told to go; returns the exit code.

    Closes `notifier`.
    """
    try:
        access = _GroupFiles.read(config)
    except (FlagError, TlsFileError) as error:
        return stop(ExitCode.CONFIG, error)
    try:
        metrics = WorkerMetrics(config.model.name, config.metrics_host, config.metrics_port)
    except OSError as error:
        address = f"{config.metrics_host}:{config.metrics_port}"
        other = _OTHER_PORT.format("metrics-port")
        problem = f"cannot serve metrics on {address}: {error.strerror}; {other}"
        return stop(ExitCode.ADDRESS, problem)
    with metrics, notifier:
        uvloop.install()
        return asyncio.run(_serve(config, access, rank, digest, metrics, notifier))


def stop(code: ExitCode, reason: object) -> int:
    """Says on stderr why the process ends; returns `code`."""
    print(f"worker: {reason}", file=sys.stderr, flush=True)
    return code


@dataclass(frozen=True)
class _GroupFiles:
    """What the coordinator must show: a certificate of the group's CA, a token of its secret."""

    tls: ReloadedTls | None
    secret: bytes | None = field(repr=False)

    @classmethod
    def read(cls, config: DaemonConfig) -> _GroupFiles:
        """Raises FlagError, TlsFileError."""
        files = group_tls(config.group_cert, config.group_key, config.group_ca)
        tls = None if files is None else ReloadedTls(files, is_server=True)
        return cls(tls, read_group_secret(config.group_secret))


async def _serve(
    config: DaemonConfig,
    access: _GroupFiles,
    rank: Rank,
    digest: str,
    metrics: WorkerMetrics,
    notifier: Notifier,
) -> int:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def shut_down(reason: str) -> None:
        _LOG.info("stopping: %s", reason)
        notifier.stopping()
        # The reply to Shutdown leaves before the server does.
        loop.call_later(0.05, stopped.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shut_down, signal.Signals(number).name)
    service = WorkerService(rank, digest, metrics, shut_down)
    server = await _server(service, access.secret)
    address, other = f"{config.host}:{config.port}", _OTHER_PORT.format("port")
    if problem := bind_problem(config.host, config.port):
        return stop(ExitCode.ADDRESS, f"cannot serve on {address}: {problem}; {other}")
    try:
        if access.tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, server_credentials(access.tls))
    except RuntimeError as error:
        return stop(ExitCode.ADDRESS, f"cannot serve on {address}: {error}; {other}")
    await server.start()
    gc.freeze()
    where = (rank.device_identity()[0], config.host, port, metrics.port)
    _LOG.info("%s serves on %s:%d, metrics on port %d", *where)
    if config.ready_file:
        write_ready_file(
            Path(config.ready_file),
            role="worker",
            rank=None,
            grpc=f"{config.host}:{port}",
            metrics=f"{config.metrics_host}:{metrics.port}",
        )
    notifier.ready()
    telling = asyncio.create_task(notifier.run(service.summary, service.stalled_s))
    watching = asyncio.create_task(service.watch_collectives())
    await stopped.wait()
    telling.cancel()
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    if config.ready_file:
        Path(config.ready_file).unlink(missing_ok=True)
    service.close()
    await server.stop(grace=0.2)
    return ExitCode.CLEAN


async def _server(service: WorkerService, secret: bytes | None) -> grpc.aio.Server:
    """WorkerService behind the group's secret, if there is one, and grpc.health.v1 for probes.

    There SERVING says that the event loop runs. Whether requests can be answered is the
    coordinator's to tell.
    """
    server = grpc.aio.server(
        interceptors=[] if secret is None else [JoinGuard(secret, lambda: service.epoch)],
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ],
    )
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(service, server)
    health_service = health.aio.HealthServicer()
    for name in ("", "liveness"):
        await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    return server
