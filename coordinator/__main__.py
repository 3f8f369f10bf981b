"""The coordinator daemon: `python -m coordinator`."""

import asyncio
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import uvloop

from coordinator import vllm_metrics
from coordinator.config import CoordinatorConfig, coordinator_config
from coordinator.engine import Engine
from coordinator.errors import BadCheckpoint, StartRefused
from coordinator.frontend.api_keys import ApiKeysError, read_api_keys
from coordinator.group_access import GroupAccess
from coordinator.metrics import EngineMetrics, MetricsServer
from coordinator.model_config import ModelConfig, read_model_config, table_width
from coordinator.step_log import StepLog
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.daemon.logs import configure_logging
from lockstep.daemon.model_digest import ModelDirError, model_digest
from lockstep.daemon.notify import Notifier
from lockstep.daemon.tls_files import TlsFileError, read_tls_files


def main(argv: list[str]) -> int:
    """Runs a coordinator until it is told to go; returns its exit code."""
    try:
        config = coordinator_config(argv, os.environ)
        configure_logging(config.log_format, "coordinator")
        _check_access_files(config)
        notifier = _notifier(config)
        digest = model_digest(config.model)
        model = read_model_config(config.model)
        table_width(config, model)
    except (FlagError, TlsFileError, ApiKeysError) as error:
        return _stop(ExitCode.CONFIG, error)
    except (ModelDirError, BadCheckpoint) as error:
        return _stop(ExitCode.CHECKPOINT, error)
    except StartRefused as error:
        return _stop(error.exit_code, error)
    metrics = EngineMetrics(config.served_model_name)
    try:
        views = {vllm_metrics.PATH: vllm_metrics.VllmCollector(metrics)}
        server = MetricsServer(metrics, config.metrics_host, config.metrics_port, views)
    except OSError as error:
        return _stop(
            ExitCode.ADDRESS,
            f"cannot serve metrics on {config.metrics_host}:{config.metrics_port}: "
            f"{error.strerror}; stop what runs there, or choose another --metrics-host or "
            "--metrics-port (0: any)",
        )
    with server, notifier:
        try:
            step_log = _step_log(config, metrics)
        except OSError as error:
            return _stop(ExitCode.CONFIG, f"--step-log {config.step_log}: {error}")
        with step_log or nullcontext():
            return _run(config, model, digest, metrics, server.port, notifier, step_log)


def _step_log(config: CoordinatorConfig, metrics: EngineMetrics) -> StepLog | None:
    if not config.step_log:
        return None
    return StepLog(Path(config.step_log), config.step_log_bytes, metrics)


def _run(
    config: CoordinatorConfig,
    model: ModelConfig,
    digest: str,
    metrics: EngineMetrics,
    metrics_port: int,
    notifier: Notifier,
    step_log: StepLog | None,
) -> int:
    async def run() -> int:
        engine = Engine(
            config,
            model,
            digest,
            metrics,
            metrics_port,
            notifier=notifier,
            step_log=step_log,
        )
        return await engine.run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _notifier(config: CoordinatorConfig) -> Notifier:
    """The line to the service manager; raises FlagError."""
    notifier = Notifier(os.environ)
    if 0 < notifier.watchdog_s <= config.step_timeout:
        raise FlagError(
            f"the watchdog's interval (WATCHDOG_USEC) is {notifier.watchdog_s:g} s; it must be "
            f"above --step-timeout {config.step_timeout:g}, after which a silent rank is recovered "
            "from without a restart of the coordinator"
        )
    return notifier


def _check_access_files(config: CoordinatorConfig) -> None:
    """Before anything is started; frontends and leader read them again when they need them.

    Raises TlsFileError, ApiKeysError, StartRefused.
    """
    if config.public_tls is not None:
        read_tls_files(config.public_tls, is_server=True)
    if config.api_keys:
        read_api_keys(Path(config.api_keys))
    GroupAccess.read(config.group_tls, config.group_secret)


def _stop(code: ExitCode, reason: object) -> int:
    print(f"coordinator: {reason}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
