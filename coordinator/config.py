"""The coordinator's settings: flags, environment, file - read once, checked once, passed down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from coordinator.admission_control import QueueLimits
from lockstep.daemon.flags import (
    Flag,
    FlagError,
    byte_size,
    choice,
    float_between,
    int_at_least,
    on_off,
    parse_flags,
    positive_int,
    tcp_port,
)
from lockstep.daemon.security_flags import (
    ALLOW_PLAINTEXT,
    CONNECTION_FLAGS,
    GROUP_FLAGS,
    PUBLIC_FLAGS,
    check_exposure,
    group_tls,
    public_tls,
)
from lockstep.daemon.tls_files import TlsFiles

# Settings that daemons share a file and an environment for, but that are not ours.
ELSEWHERE = frozenset({"tp", "devices", "device", "num-threads", "nccl-path", "http"})

_MIN_LOG_BYTES = 1 << 20


def worker_addresses(text: str) -> tuple[str, ...]:
    """Parses host:port,host:port,...; ValueError says what it wants."""
    addresses = tuple(part.strip() for part in text.split(","))
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError("want host:port,host:port,... in order of rank")
    if len(set(addresses)) != len(addresses):
        raise ValueError("one address stands for two ranks")
    return addresses


def _path(text: str) -> Path:
    return Path(text)


def _log_size(text: str) -> int:
    size = byte_size(text)
    if size < _MIN_LOG_BYTES:
        raise ValueError(f"want at least {_MIN_LOG_BYTES >> 10}K")
    return size


def otlp_endpoint(text: str) -> str:
    """Parses the URL of an OTLP collector that speaks gRPC, or nothing."""
    scheme, _, rest = text.partition("://")
    if text and (scheme not in ("http", "https") or not rest.rpartition(":")[2].isdigit()):
        raise ValueError("want http://host:port, or https://host:port for TLS")
    return text


_TIMEOUT = float_between(0.1, 86400.0)
_PAUSE = float_between(0.0, 3600.0)

FLAGS = (
    Flag("model", _path, None, "checkpoint folder"),
    Flag("served-model-name", str, "", "name clients use; default: the folder's name"),
    Flag("workers", worker_addresses, (), "host:port of each worker, in order of rank"),
    Flag("dtype", choice("auto", "float32", "bfloat16", "float16"), "auto", "of weights and cache"),
    Flag("max-model-len", int_at_least(0), 0, "longest prompt + output; 0: what fits"),
    Flag("max-num-seqs", positive_int, 256, "most requests in the batch"),
    Flag("max-batch-tokens", positive_int, 2048, "most tokens in a step"),
    Flag("block-size", positive_int, 16, "tokens in a KV block"),
    Flag("kv-cache-bytes", byte_size, 0, "KV cache of one rank; 0: from free memory"),
    Flag("gpu-memory-fraction", float_between(0.01, 1.0), 0.9, "share of GPU memory to use"),
    Flag("load-format", choice("safetensors", "dummy"), "safetensors", "dummy: random weights"),
    Flag("comm", choice("auto", "nccl", "shm", "gloo"), "auto", "how ranks talk to each other"),
    Flag("prefix-cache", on_off, True, "requests share KV blocks of equal prefixes"),
    Flag("use-graphs", on_off, True, "capture steps as CUDA graphs"),
    Flag("step-timeout", _TIMEOUT, 30.0, "seconds after which a silent rank is lost"),
    Flag("startup-timeout", _TIMEOUT, 600.0, "seconds for the ranks to come up"),
    Flag("drain-seconds", float_between(0.0, 86400.0), 30.0, "seconds requests get on SIGTERM"),
    Flag("withdrawal-seconds", _PAUSE, 0.0, "seconds on SIGTERM in which requests are still taken"),
    Flag("host", str, "127.0.0.1", "address to serve on"),
    Flag("port", tcp_port, 50051, "gRPC port; 0: any"),
    Flag("metrics-host", str, "127.0.0.1", "address to serve metrics on"),
    Flag("metrics-port", tcp_port, 9851, "Prometheus port; 0: any"),
    Flag("max-queue-requests", positive_int, 1024, "most requests that wait"),
    Flag("max-queue-prompt-tokens", positive_int, 1 << 20, "most prompt tokens that wait"),
    Flag("max-queue-time", float_between(0.0, 86400.0), 0.0, "predicted, in seconds; 0: any"),
    Flag("step-log", str, "", "file to log step commands and results to, for lockstep replay"),
    Flag("step-log-bytes", _log_size, 256 << 20, "most bytes of the step log's files together"),
    Flag("num-frontends", positive_int, 1, "processes that serve the public API"),
    Flag("grammar-processes", positive_int, 1, "processes that enforce constraints on outputs"),
    Flag("slow-client-seconds", _TIMEOUT, 30.0, "seconds that unread output is kept"),
    Flag("otlp-endpoint", otlp_endpoint, "", "collector of traces, http://host:4317; off if empty"),
    *PUBLIC_FLAGS,
    ALLOW_PLAINTEXT,
    *CONNECTION_FLAGS,
    *GROUP_FLAGS,
    Flag("log-format", choice("text", "json"), "text", "log lines for people or machines"),
    Flag("ready-file", str, "", "file to write once requests can be answered"),
)


@dataclass(frozen=True)
class CoordinatorConfig:
    """Settings of the coordinator; see FLAGS for their meaning. Times in seconds."""

    model: Path
    served_model_name: str
    workers: tuple[str, ...]
    dtype: str = "auto"
    max_model_len: int = 0
    max_num_seqs: int = 256
    max_batch_tokens: int = 2048
    block_size: int = 16
    kv_cache_bytes: int = 0
    gpu_memory_fraction: float = 0.9
    load_format: str = "safetensors"
    comm: str = "auto"
    prefix_cache: bool = True
    use_graphs: bool = True
    step_timeout: float = 30.0
    startup_timeout: float = 600.0
    drain_seconds: float = 30.0
    withdrawal_seconds: float = 0.0
    otlp_endpoint: str = ""
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9851
    max_queue_requests: int = 1024
    max_queue_prompt_tokens: int = 1 << 20
    max_queue_time: float = 0.0
    step_log: str = ""
    step_log_bytes: int = 256 << 20
    num_frontends: int = 1
    grammar_processes: int = 1
    slow_client_seconds: float = 30.0
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    api_keys: str = ""
    allow_plaintext: bool = False
    max_connections: int = 4096
    max_concurrent_streams: int = 2048
    group_cert: str = ""
    group_key: str = ""
    group_ca: str = ""
    group_secret: str = ""
    log_format: str = "text"
    ready_file: str = ""

    def __post_init__(self) -> None:
        if not self.workers:
            raise FlagError("--workers is missing; it wants host:port of each worker by rank")
        if self.max_batch_tokens < self.max_num_seqs:
            raise FlagError(
                f"--max-batch-tokens {self.max_batch_tokens} is below --max-num-seqs "
                f"{self.max_num_seqs}: every running request takes a token in each step; "
                f"lower --max-num-seqs or raise --max-batch-tokens"
            )
        has_tls = self.public_tls is not None
        check_exposure(self.host, has_tls, self.allow_plaintext, "give --tls-cert and --tls-key")
        _ = self.group_tls  # complete, or FlagError

    @property
    def queue_limits(self) -> QueueLimits:
        return QueueLimits(
            self.max_queue_requests, self.max_queue_prompt_tokens, self.max_queue_time
        )

    @property
    def world_size(self) -> int:
        return len(self.workers)

    @property
    def public_tls(self) -> TlsFiles | None:
        """Files of the public port; None: clients speak in the clear."""
        return public_tls(self.tls_cert, self.tls_key, self.tls_client_ca)

    @property
    def group_tls(self) -> TlsFiles | None:
        """Files for the workers; None: they are spoken to in the clear."""
        return group_tls(self.group_cert, self.group_key, self.group_ca)


def coordinator_config(argv: Sequence[str], environ: Mapping[str, str]) -> CoordinatorConfig:
    """Reads the settings; raises FlagError."""
    values = parse_flags("coordinator", FLAGS, argv, environ, ELSEWHERE)
    if values["model"] is None:
        raise FlagError("--model is missing; it wants a checkpoint folder")
    values["served_model_name"] = values["served_model_name"] or values["model"].resolve().name
    assert {flag.dest for flag in FLAGS} == {item.name for item in fields(CoordinatorConfig)}
    return CoordinatorConfig(**values)
