"""A worker's settings: what this process alone decides. What ranks agree on comes by `Load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lockstep.daemon.flags import Flag, FlagError, choice, int_at_least, parse_flags, tcp_port
from lockstep.daemon.security_flags import (
    ALLOW_PLAINTEXT,
    GROUP_FLAGS,
    PUBLIC_FLAGS,
    check_exposure,
    group_tls,
)

FLAGS = (
    Flag("model", Path, None, "checkpoint folder"),
    Flag("device", str, "cpu", "cpu or cuda:INDEX"),
    Flag("host", str, "127.0.0.1", "address to serve on"),
    Flag("port", tcp_port, 50100, "gRPC port; 0: any"),
    Flag("metrics-host", str, "127.0.0.1", "address to serve metrics on"),
    Flag("metrics-port", tcp_port, 9860, "Prometheus port; 0: any"),
    Flag("num-threads", int_at_least(0), 0, "CPU threads for the model; 0: all cores we may use"),
    Flag("nccl-path", str, "", "libnccl.so.2 to load instead of the one found"),
    *GROUP_FLAGS,
    ALLOW_PLAINTEXT,
    Flag("ready-file", str, "", "file to write once serving"),
    Flag("log-format", choice("text", "json"), "text", "log lines for people or machines"),
)

COORDINATOR_FLAGS = frozenset(
    (
        *("served-model-name", "workers", "tp", "devices", "dtype", "max-model-len"),
        *("max-num-seqs", "max-batch-tokens", "block-size", "kv-cache-bytes"),
        *("gpu-memory-fraction", "load-format", "comm", "prefix-cache", "step-timeout"),
        *("startup-timeout", "drain-seconds", "max-queue-requests", "num-frontends", "use-graphs"),
        *("withdrawal-seconds", "otlp-endpoint", "max-queue-prompt-tokens", "max-queue-time"),
        *("step-log", "step-log-bytes", "slow-client-seconds"),
        *("max-connections", "max-concurrent-streams"),
        *(flag.name for flag in PUBLIC_FLAGS),
    )
)


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of one worker process."""

    model: Path
    device: str
    host: str
    port: int
    metrics_port: int
    num_threads: int
    nccl_path: str
    ready_file: str
    log_format: str
    metrics_host: str = "127.0.0.1"
    group_cert: str = ""
    group_key: str = ""
    group_ca: str = ""
    group_secret: str = ""
    allow_plaintext: bool = False

    def __post_init__(self) -> None:
        check_group_settings(self)
        if not self.model:
            raise FlagError("--model is missing; it wants a checkpoint folder")
        kind, _, index = self.device.partition(":")
        if self.device != "cpu" and not (kind == "cuda" and index.isdigit()):
            raise FlagError(f"--device: {self.device!r} is not cpu or cuda:INDEX")


class GroupSettings(Protocol):
    """What every kind of worker knows of how the coordinator proves itself."""

    @property
    def host(self) -> str: ...
    @property
    def group_cert(self) -> str: ...
    @property
    def group_key(self) -> str: ...
    @property
    def group_ca(self) -> str: ...
    @property
    def group_secret(self) -> str: ...
    @property
    def allow_plaintext(self) -> bool: ...


def check_group_settings(config: GroupSettings) -> None:
    """Raises FlagError: files that go together are not, or the port would be open to others."""
    files = group_tls(config.group_cert, config.group_key, config.group_ca)
    remedy = "give --group-cert, --group-key and --group-ca"
    check_exposure(config.host, files is not None, config.allow_plaintext, remedy)


def worker_config(argv: Sequence[str], environ: Mapping[str, str]) -> WorkerConfig:
    """Reads the settings; raises FlagError.

    The environment is shared with the coordinator, whose settings may stand there too.
    """
    return WorkerConfig(**parse_flags("worker", FLAGS, argv, environ, COORDINATOR_FLAGS))
