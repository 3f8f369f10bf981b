"""Settings of a frontend process; the engine that spawns it passes every one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.daemon.flags import (
    Flag,
    FlagError,
    choice,
    float_between,
    int_at_least,
    parse_flags,
    positive_int,
    tcp_port,
)
from lockstep.daemon.security_flags import CONNECTION_FLAGS, PUBLIC_FLAGS


@dataclass(frozen=True)
class FrontendConfig:
    """One frontend. Times are in seconds; `port` 0 means any free one."""

    engine_fd: int
    engine_pid: int
    model: Path
    served_model_name: str
    host: str
    port: int
    silence_timeout: float
    num_frontends: int
    slow_client_seconds: float
    tls_cert: str
    tls_key: str
    tls_client_ca: str
    api_keys: str
    max_connections: int
    max_concurrent_streams: int
    log_format: str
    otlp_endpoint: str = ""


_FLAGS = (
    Flag("engine-fd", int_at_least(3), None, "inherited socket to the engine"),
    Flag("engine-pid", positive_int, None, "process id of the engine, our parent"),
    Flag("model", Path, None, "checkpoint folder"),
    Flag("served-model-name", str, None, "name that clients use"),
    Flag("host", str, "127.0.0.1", "address to listen on"),
    Flag("port", tcp_port, 50051, "port to listen on; 0: any"),
    Flag("silence-timeout", float_between(0.1, 86400), 32.0, "engine counts as stopped, seconds"),
    Flag("num-frontends", positive_int, 1, "frontends that share the port"),
    Flag("slow-client-seconds", float_between(0.1, 86400), 30.0, "unread output is kept for"),
    *PUBLIC_FLAGS,
    *CONNECTION_FLAGS,
    Flag("log-format", choice("text", "json"), "text", "text or json"),
    Flag("otlp-endpoint", str, "", "collector of traces"),
)
_REQUIRED = ("engine_fd", "engine_pid", "model", "served_model_name")


def parse_config(argv: Sequence[str]) -> FrontendConfig:
    """Reads the command line alone: the environment is the coordinator's. Raises FlagError."""
    values = parse_flags("python -m coordinator.frontend", _FLAGS, argv, environ={})
    for name in _REQUIRED:
        if values[name] is None:
            raise FlagError(f"--{name.replace('_', '-')} is missing")
    return FrontendConfig(**values)
