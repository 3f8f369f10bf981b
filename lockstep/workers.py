"""`lockstep workers`: the ranks of this host, for a coordinator that runs elsewhere.

Worker n gets port `--port` + n and is kept running. The coordinator ends workers when a rank is
lost and counts on their return, so an exit is nothing unusual here, but for one that would recur: a
worker that refuses to start (exit codes 2 to 5) ends all with its code.
"""

import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockstep import serve
from lockstep.cores import available_cores
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import Flag, FlagError, choice, parse_flags, positive_int, tcp_port
from lockstep.daemon.security_flags import ALLOW_PLAINTEXT, GROUP_FLAGS
from lockstep.daemon_process import daemon_environ, python_module
from lockstep.devices import choose_devices, count_gpus
from lockstep.errors import ConfigError, HubError
from lockstep.hub import resolve_model
from lockstep.processes import ChildExited, Processes, SignalReceived, supervised_processes

FLAGS = (
    Flag("model", str, None, "checkpoint folder or hub id (owner/name)"),
    Flag("devices", str, None, "cpu, or GPU numbers like 0,1; default: every GPU"),
    Flag("host", str, "127.0.0.1", "address to serve on"),
    Flag("port", tcp_port, 50100, "gRPC port of the first worker, 1 above for the next"),
    Flag("metrics-host", str, "127.0.0.1", "address to serve metrics on"),
    Flag("metrics-port", tcp_port, 9860, "Prometheus port of the first, 1 above for the next"),
    Flag("num-threads", positive_int, None, "CPU threads of a rank; default: its share of cores"),
    Flag("nccl-path", str, None, "libnccl.so.2 to load instead of the one found"),
    *GROUP_FLAGS,
    ALLOW_PLAINTEXT,
    Flag("log-format", choice("text", "json"), "text", "log lines for people or machines"),
)
# The environment may be one for all daemons of a group.
_ELSEWHERE = frozenset({flag.name for flag in serve.COORDINATOR_FLAGS}) | {
    *("workers", "tp", "device", "drain-seconds", "withdrawal-seconds", "restart", "ready-file"),
    "http",
}
_REFUSALS = (ExitCode.CONFIG, ExitCode.CHECKPOINT, ExitCode.DEVICE, ExitCode.ADDRESS)
# Of one worker, before this gives up: each loss of a rank anywhere ends every worker once, and the
# coordinator itself gives up after three in that time.
_MAX_STARTS = 20
_START_WINDOW_S = 600.0
_STOP_LIMIT_S = 10.0
_IDLE_S = 60.0


@dataclass(frozen=True)
class WorkersConfig:
    """Settings of the workers of one host; `devices` has one torch device name a worker."""

    model: str
    devices: tuple[str, ...]
    host: str
    port: int
    metrics_host: str
    metrics_port: int
    num_threads: int
    nccl_path: str | None
    log_format: str
    group_cert: str = ""
    group_key: str = ""
    group_ca: str = ""
    group_secret: str = ""
    allow_plaintext: bool = False

    def commands(self, model_dir: str) -> dict[str, list[str]]:
        """Command line of every worker, by name."""
        more = ["--nccl-path", self.nccl_path] if self.nccl_path else []
        for flag in GROUP_FLAGS:
            more += [f"--{flag.name}", value] if (value := getattr(self, flag.dest)) else []
        more += ["--allow-plaintext", "on"] if self.allow_plaintext else []
        return {
            f"worker {index}": [
                *python_module("worker"),
                *("--model", model_dir, "--device", device),
                *("--host", self.host, "--port", str(self.port + index)),
                *("--metrics-host", self.metrics_host),
                *("--metrics-port", str(self.metrics_port + index)),
                *("--num-threads", str(self.num_threads), "--log-format", self.log_format),
                *more,
            ]
            for index, device in enumerate(self.devices)
        }


def main(argv: Sequence[str]) -> int:
    """Keeps the workers running until told to stop; returns the exit code."""
    try:
        config = workers_config(argv, os.environ)
        model_dir = resolve_model(config.model)
    except (FlagError, ConfigError) as error:
        return _refuse(error, ExitCode.CONFIG)
    except HubError as error:
        return _refuse(error, ExitCode.CHECKPOINT)
    with supervised_processes() as processes:
        environ = daemon_environ(os.environ)
        return keep_running(config.commands(str(model_dir)), environ, processes)


def workers_config(argv: Sequence[str], environ: Mapping[str, str]) -> WorkersConfig:
    """Reads the settings and looks at the host. Raises FlagError, ConfigError."""
    values = parse_flags("lockstep workers", FLAGS, argv, environ, _ELSEWHERE)
    if not values["model"]:
        raise FlagError("--model is missing; it wants a checkpoint folder or a hub id")
    wanted = values.pop("devices")
    num_gpus = 0 if wanted == "cpu" else count_gpus(environ)
    num_ranks = len(wanted.split(",")) if wanted else max(1, num_gpus)
    devices = choose_devices(wanted, num_ranks, num_gpus)
    for name in ("port", "metrics_port"):
        if values[name] == 0 or values[name] + num_ranks > 65536:
            raise FlagError(
                f"--{name.replace('_', '-')} is {values[name]}; it must be 1 to "
                f"{65536 - num_ranks}, since {num_ranks} worker(s) count up from it"
            )
    values["num_threads"] = values["num_threads"] or max(1, available_cores() // num_ranks)
    return WorkersConfig(devices=devices, **values)


def keep_running(
    commands: Mapping[str, Sequence[str]], environ: Mapping[str, str], processes: Processes
) -> int:
    """Starts every command, and again when it ends, until a signal; returns the exit code."""
    starts: dict[str, deque[float]] = {name: deque() for name in commands}
    for name, command in commands.items():
        processes.start(name, command, environ)
    while True:
        match processes.next_event(_IDLE_S):
            case SignalReceived():
                processes.stop_all(tuple(commands), _STOP_LIMIT_S)
                return ExitCode.CLEAN
            case ChildExited(name=name, code=code) as exited:
                if code in _REFUSALS:
                    return _give_up(processes, commands, f"{exited}: it says why above", code)
                if _is_too_often(starts[name]):
                    why = (
                        f"{exited}, after {_MAX_STARTS} starts in {_START_WINDOW_S / 60:g} minutes"
                    )
                    return _give_up(processes, commands, why, ExitCode.GROUP_LOST)
                serve.report("workers", f"{exited}; starting it again")
                processes.start(name, commands[name], environ)


def _is_too_often(starts: deque[float]) -> bool:
    now = time.monotonic()
    starts.append(now)
    while now - starts[0] > _START_WINDOW_S:
        starts.popleft()
    return len(starts) >= _MAX_STARTS


def _give_up(
    processes: Processes, commands: Mapping[str, Sequence[str]], why: str, code: int
) -> int:
    serve.report("workers", f"{why}; stopping")
    processes.stop_all(tuple(commands), _STOP_LIMIT_S)
    return code


def _refuse(error: Exception, code: ExitCode) -> int:
    serve.report("workers", str(error))
    return code
