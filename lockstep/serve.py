"""`lockstep serve`: one model on this host, a worker per rank and a coordinator, supervised."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from lockstep.cores import available_cores
from lockstep.daemon.addresses import bind_problem
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import (
    Flag,
    FlagError,
    choice,
    float_between,
    on_off,
    parse_flags,
    positive_int,
    tcp_port,
)
from lockstep.daemon.group_secret import hold_new_secret
from lockstep.daemon.ready_file import write_ready_file
from lockstep.daemon.security_flags import ALLOW_PLAINTEXT, GROUP_FLAGS, PUBLIC_FLAGS
from lockstep.daemon_process import daemon_environ, python_module
from lockstep.devices import choose_devices, count_gpus
from lockstep.errors import AddressInUse, ConfigError, HubError
from lockstep.gateway import (
    GatewaySpec,
    HttpAddress,
    free_port,
    gateway_spec,
    http_address,
    require_gateway,
)
from lockstep.hub import resolve_model
from lockstep.processes import supervised_processes
from lockstep.ready_record import ReadyRecord
from lockstep.supervisor import GroupSpec, Supervisor

_MAX_RANKS = 64
_MAX_PORT = 65535
# From the coordinator's metrics port to that of rank 0: 9851 and 9860.
_WORKER_METRICS_OFFSET = 9
# To that of the gateway: 9852.
_GATEWAY_METRICS_OFFSET = 1
# What a coordinator needs beside its drain time, to tell ranks and frontends.
_STOP_MARGIN_S = 15.0
_PAUSE = float_between(0.0, 3600.0)

# The coordinator's own: passed on as they are, checked and given their defaults there.
COORDINATOR_FLAGS = (
    Flag("served-model-name", str, None, "name clients use; default: the folder's name"),
    Flag("dtype", str, None, "auto, float32, bfloat16 or float16 (default: auto)"),
    Flag("max-model-len", str, None, "longest prompt + output, in tokens; default: what fits"),
    Flag("max-num-seqs", str, None, "most requests in the batch (default: 256)"),
    Flag("max-batch-tokens", str, None, "most tokens in a step (default: 2048)"),
    Flag("block-size", str, None, "tokens in a KV block (default: 16)"),
    Flag("kv-cache-bytes", str, None, "KV cache of one rank; default: from free memory"),
    Flag("gpu-memory-fraction", str, None, "share of GPU memory to use (default: 0.9)"),
    Flag("load-format", str, None, "safetensors, or dummy weights (default: safetensors)"),
    Flag("comm", str, None, "auto, nccl, shm or gloo (default: auto)"),
    Flag("prefix-cache", str, None, "requests share KV blocks of equal prefixes (default: on)"),
    Flag("use-graphs", str, None, "on or off: capture steps as CUDA graphs (default: on)"),
    Flag("step-timeout", str, None, "seconds after which a silent rank is lost (default: 30)"),
    Flag("startup-timeout", str, None, "seconds for the ranks to come up (default: 600)"),
    Flag("max-queue-requests", str, None, "most requests that wait (default: 1024)"),
    Flag("max-queue-prompt-tokens", str, None, "most prompt tokens that wait (default: 1048576)"),
    Flag("max-queue-time", str, None, "most predicted seconds in the queue; default: any"),
    Flag("step-log", str, None, "file to log step commands and results to, for lockstep replay"),
    Flag("step-log-bytes", str, None, "most bytes of the step log's files (default: 268435456)"),
    Flag("num-frontends", str, None, "processes that serve the public API (default: 1)"),
    Flag("grammar-processes", str, None, "processes that enforce constraints (default: 1)"),
    Flag("slow-client-seconds", str, None, "seconds that unread output is kept (default: 30)"),
    Flag("otlp-endpoint", str, None, "collector of traces, http://host:4317; off if empty"),
    Flag("host", str, None, "address to serve on (default: 127.0.0.1)"),
    *(replace(flag, default=None) for flag in PUBLIC_FLAGS),
    Flag("allow-plaintext", str, None, f"{ALLOW_PLAINTEXT.help} (default: off)"),
    Flag("max-connections", str, None, "most connections of clients (default: 4096)"),
    Flag("max-concurrent-streams", str, None, "most calls on a connection (default: 2048)"),
)
OWN_FLAGS = (
    Flag("model", str, None, "checkpoint folder or hub id (owner/name)"),
    Flag("tp", positive_int, 1, "ranks that share the model"),
    Flag("devices", str, None, "cpu, or GPU numbers like 0,1; default: GPUs if there are any"),
    Flag("num-threads", positive_int, None, "CPU threads of a rank; default: its share of cores"),
    Flag("port", tcp_port, 50051, "gRPC port; 0: any"),
    Flag("metrics-host", str, "127.0.0.1", "address to serve metrics on"),
    Flag("metrics-port", tcp_port, 9851, "Prometheus port, + 9 + r that of rank r; 0: any"),
    Flag("drain-seconds", float_between(0.0, 86400.0), 30.0, "seconds requests get on SIGTERM"),
    Flag("withdrawal-seconds", _PAUSE, 0.0, "seconds on SIGTERM in which requests are still taken"),
    Flag("nccl-path", str, None, "libnccl.so.2 to load instead of the one found"),
    Flag("restart", on_off, True, "off: a lost rank ends everything, with exit code 6"),
    Flag("log-format", choice("text", "json"), "text", "log lines for people or machines"),
    Flag("ready-file", Path, None, "file to write once requests can be answered"),
    *GROUP_FLAGS,
    Flag("http", http_address, None, "gateway for HTTP: on (127.0.0.1:30000), HOST:PORT", "on"),
)
_ELSEWHERE = frozenset({"workers", "device"})


@dataclass(frozen=True)
class ServeConfig:
    """Settings of one `lockstep serve`. `passed_on` are the coordinator's flags as words."""

    model: str
    devices: tuple[str, ...]
    num_threads: int
    port: int
    metrics_host: str
    metrics_port: int
    drain_seconds: float
    withdrawal_seconds: float
    nccl_path: str | None
    restart: bool
    log_format: str
    ready_file: Path | None
    passed_on: tuple[str, ...]
    group_cert: str = ""
    group_key: str = ""
    group_ca: str = ""
    group_secret: str = ""
    http: HttpAddress | None = None

    def with_secret(self) -> Self:
        """With a secret of its own, that no other process of another user knows, if it has none."""
        return self if self.group_secret else replace(self, group_secret=hold_new_secret())

    @property
    def group_words(self) -> tuple[str, ...]:
        """How coordinator and workers prove themselves to each other, as flags."""
        given = ((flag.name, getattr(self, flag.dest)) for flag in GROUP_FLAGS)
        return tuple(word for name, value in given if value for word in (f"--{name}", value))

    @property
    def num_ranks(self) -> int:
        """Workers, one a rank."""
        return len(self.devices)

    def worker_metrics_port(self, rank: int) -> int:
        """Where that rank tells its metrics; 0: any port."""
        return self.metrics_port + _WORKER_METRICS_OFFSET + rank if self.metrics_port else 0

    def gateway_metrics(self) -> HttpAddress:
        """Where the gateway tells its metrics."""
        if not self.metrics_port:
            return HttpAddress(self.metrics_host, free_port(self.metrics_host))
        return HttpAddress(self.metrics_host, self.metrics_port + _GATEWAY_METRICS_OFFSET)


def main(argv: Sequence[str]) -> int:
    """Serves until told to stop; returns the exit code."""
    started = time.monotonic()
    try:
        config = serve_config(argv, os.environ).with_secret()
        _report(f"starting {_ranks(config)} on {', '.join(config.devices)}")
        model_dir = resolve_model(config.model)
        group = group_spec(config, model_dir, os.environ)
    except (FlagError, ConfigError) as error:
        return _refuse(error, ExitCode.CONFIG)
    except HubError as error:
        return _refuse(error, ExitCode.CHECKPOINT)
    except AddressInUse as error:
        return _refuse(error, ExitCode.ADDRESS)
    return run_group(config, group, started, _report)


def run_group(
    config: ServeConfig, group: GroupSpec, started: float, report: Callable[[str], None]
) -> int:
    """Supervises `group` until it ends; returns the exit code. `started` is CLOCK_MONOTONIC."""

    is_restart = False

    def announce(record: ReadyRecord) -> None:
        nonlocal is_restart
        when = "again" if is_restart else f"after {time.monotonic() - started:.1f} s"
        is_restart = True
        http = f", http://{config.http}/v1" if config.http else ""
        where = f"{record.grpc}{http}"
        report(f"ready: {config.model} at {where}, {_ranks(config)}, {when}")
        if config.ready_file is not None:
            write_ready_file(
                config.ready_file,
                role="serve",
                rank=None,
                grpc=record.grpc,
                metrics=record.metrics,
                http=str(config.http or ""),
            )

    try:
        with supervised_processes() as processes:
            return Supervisor(group, processes, report, announce).run()
    finally:
        if config.ready_file is not None:
            config.ready_file.unlink(missing_ok=True)


def serve_config(argv: Sequence[str], environ: Mapping[str, str]) -> ServeConfig:
    """Reads the settings and looks at the host. Raises FlagError, ConfigError."""
    flags = (*OWN_FLAGS, *COORDINATOR_FLAGS)
    values = parse_flags("lockstep serve", flags, argv, environ, _ELSEWHERE)
    if not values["model"]:
        raise FlagError("--model is missing; it wants a checkpoint folder or a hub id")
    num_ranks = values.pop("tp")
    if num_ranks > _MAX_RANKS:
        raise ConfigError(f"--tp is {num_ranks}; it must be at most {_MAX_RANKS}")
    wanted = values.pop("devices")
    num_gpus = 0 if wanted == "cpu" else count_gpus(environ)
    devices = choose_devices(wanted, num_ranks, num_gpus)
    num_threads = values.pop("num_threads") or max(1, available_cores() // num_ranks)
    passed_on: list[str] = []
    for flag in COORDINATOR_FLAGS:
        value = values.pop(flag.dest)
        if value is not None:
            passed_on += [f"--{flag.name}", value]
    if Path(values["model"]).is_dir() is False and "--served-model-name" not in passed_on:
        passed_on += ["--served-model-name", values["model"]]
    config = ServeConfig(
        devices=devices, num_threads=num_threads, passed_on=tuple(passed_on), **values
    )
    last_port = config.worker_metrics_port(num_ranks - 1)
    if last_port > _MAX_PORT:
        raise ConfigError(
            f"--metrics-port is {config.metrics_port}; with it rank {num_ranks - 1} would tell its "
            f"metrics on port {last_port}, and the highest port is {_MAX_PORT}"
        )
    return config


def group_spec(config: ServeConfig, model_dir: Path, environ: Mapping[str, str]) -> GroupSpec:
    """The daemons' command lines. Every setting is a flag there: their environment has none.

    Raises ConfigError, AddressInUse where a gateway is asked for and cannot be.
    """

    def worker_command(rank: int, port: int, metrics_port: int, ready_file: str) -> Sequence[str]:
        command = [
            *python_module("worker"),
            *("--model", str(model_dir), "--device", config.devices[rank]),
            *("--port", str(port), "--metrics-port", str(metrics_port)),
            *("--metrics-host", config.metrics_host),
            *("--num-threads", str(config.num_threads)),
            *("--ready-file", ready_file, "--log-format", config.log_format),
            *config.group_words,
        ]
        return command + (["--nccl-path", config.nccl_path] if config.nccl_path else [])

    def coordinator_command(
        workers: Sequence[str], port: int, metrics_port: int, ready_file: str
    ) -> Sequence[str]:
        return [
            *python_module("coordinator"),
            *("--model", str(model_dir), "--workers", ",".join(workers)),
            *("--port", str(port), "--metrics-port", str(metrics_port)),
            *("--metrics-host", config.metrics_host),
            *("--drain-seconds", str(config.drain_seconds)),
            *("--withdrawal-seconds", str(config.withdrawal_seconds)),
            *("--ready-file", ready_file, "--log-format", config.log_format),
            *config.group_words,
            *config.passed_on,
        ]

    return GroupSpec(
        num_ranks=config.num_ranks,
        worker_command=worker_command,
        coordinator_command=coordinator_command,
        coordinator_ports=(config.port, config.metrics_port),
        environ=daemon_environ(environ),
        worker_metrics_port=config.worker_metrics_port,
        restarts=config.restart,
        drain_timeout_s=config.withdrawal_seconds + config.drain_seconds + _STOP_MARGIN_S,
        gateway=_gateway(config, model_dir, environ),
    )


def _gateway(
    config: ServeConfig, model_dir: Path, environ: Mapping[str, str]
) -> GatewaySpec | None:
    """The gateway asked for. It says badly why it cannot listen, so that is tried here."""
    if config.http is None:
        return None
    if unsuited := [flag for flag in ("--tls-cert", "--api-keys") if flag in config.passed_on]:
        raise ConfigError(
            f"--http with {unsuited[0]}: the gateway speaks to the engine in the clear and shows "
            "it no key; leave one of them out"
        )
    require_gateway()
    metrics = config.gateway_metrics()
    for flag, address in (("--http", config.http), ("--metrics-port", metrics)):
        problem = bind_problem(address.host, address.port)
        if problem:
            raise AddressInUse(
                f"the gateway cannot listen on {address}: {problem}; choose another {flag}"
            )
    return gateway_spec(
        config.http,
        model_dir,
        metrics,
        config.drain_seconds,
        config.log_format,
        daemon_environ(environ),
    )


def _ranks(config: ServeConfig) -> str:
    return "1 rank" if config.num_ranks == 1 else f"{config.num_ranks} ranks"


def report(command: str, line: str) -> None:
    """A line for people, from `lockstep COMMAND`."""
    print(f"lockstep {command}: {line}", file=sys.stderr, flush=True)


def _report(line: str) -> None:
    report("serve", line)


def _refuse(error: Exception, code: ExitCode) -> int:
    _report(str(error))
    return code
