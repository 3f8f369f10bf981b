"""The worker daemon: `python -m worker`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.daemon.logs import configure_logging
from lockstep.daemon.model_digest import ModelDirError, model_digest
from lockstep.daemon.notify import Notifier
from lockstep.daemon.ready_file import write_ready_file
from protos.lockstep.v1 import worker_pb2_grpc
from tpcomm.nccl_loader import nccl_environment
from worker.config import WorkerConfig, worker_config
from worker.device import prepare_device
from worker.errors import DeviceError, WorkerError
from worker.metrics import WorkerMetrics
from worker.models.spec import load_model_spec
from worker.rank import Rank
from worker.service import WorkerService

_LOG = logging.getLogger(__name__)
_MAX_MESSAGE_BYTES = 256 << 20


def main(argv: list[str]) -> int:
    """Runs a worker until it is told to go; returns its exit code."""
    try:
        config = worker_config(argv, os.environ)
        notifier = Notifier(os.environ)
    except FlagError as error:
        return _stop(ExitCode.CONFIG, error)
    configure_logging(config.log_format, f"worker[{os.getpid()}]")
    os.environ.update(nccl_environment(os.environ))
    try:
        digest = model_digest(config.model)
        rank = Rank(config, load_model_spec(config.model))
        prepare_device(config)
    except DeviceError as error:
        return _stop(ExitCode.DEVICE, error)
    except (ModelDirError, WorkerError) as error:
        return _stop(ExitCode.CHECKPOINT, error)
    try:
        metrics = WorkerMetrics(config.model.name, config.metrics_host, config.metrics_port)
    except OSError as error:
        address = f"{config.metrics_host}:{config.metrics_port}"
        return _stop(ExitCode.ADDRESS, f"--metrics-port: cannot serve on {address}: {error}")
    with metrics, notifier:
        uvloop.install()
        return asyncio.run(_serve(config, rank, digest, metrics, notifier))


async def _serve(
    config: WorkerConfig, rank: Rank, digest: str, metrics: WorkerMetrics, notifier: Notifier
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
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ]
    )
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(service, server)
    await _add_health(server)
    address = f"{config.host}:{config.port}"
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        return _stop(ExitCode.ADDRESS, f"cannot serve on {address}: {error}")
    await server.start()
    gc.freeze()
    where = (config.device, config.host, port, metrics.port)
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
    await stopped.wait()
    telling.cancel()
    if config.ready_file:
        Path(config.ready_file).unlink(missing_ok=True)
    service.close()
    await server.stop(grace=0.2)
    return ExitCode.CLEAN


async def _add_health(server: grpc.aio.Server) -> None:
    """grpc.health.v1 for probes: the event loop runs. Readiness is the coordinator's to tell."""
    servicer = health.aio.HealthServicer()
    for name in ("", "liveness"):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)


def _stop(code: ExitCode, reason: object) -> int:
    print(f"worker: {reason}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a device thread may hang in a collective of a dead group, and the interpreter
    # would wait for it. Everything of ours has been closed above.
    os._exit(exit_code)
