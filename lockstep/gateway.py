"""The HTTP gateway in front of a group: SMG, a program that we do not write, by the extra `http`.

It speaks OpenAI's and Anthropic's HTTP APIs to clients and `vllm.grpc.engine.VllmEngine` to us, and
asks us for model, limits and tokenizer. docs/openai-http.md says what it can do and what not.
"""

import http.client
import importlib.util
import ipaddress
import json
import math
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.errors import ConfigError

DEFAULT_ADDRESS = "127.0.0.1:30000"
_MODULE = "smg"
_READY_TIMEOUT_S = 1.0
# It leaves 4 to 7 s after its last stream.
_STOP_MARGIN_S = 15.0
_MAX_PAYLOAD_BYTES = 16 * 2**20
# Longer than any prefill: whether the group makes progress is watched here, not there.
_NO_WEDGE_S = 86400
# Nobody listens there. The gateway looks for a tokenizer on a model hub before it asks us.
_NO_HUB = "http://127.0.0.1:9"
_TEMPLATE_FILES = ("chat_template.json", "tokenizer_config.json")
# What a chat template writes for calls of tools -> the gateway's parser of that.
_TOOL_PARSERS = {"<tool_call>": "qwen", "[TOOL_CALLS]": "mistral", "<|python_tag|>": "llama"}


@dataclass(frozen=True)
class HttpAddress:
    """Where the gateway serves."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class GatewaySpec:
    """How to run one. `command` takes the group's host:port; `is_ready` waits a second at most."""

    address: HttpAddress
    command: Callable[[str], Sequence[str]]
    is_ready: Callable[[], bool]
    environ: Mapping[str, str]
    start_timeout_s: float = 30.0
    stop_timeout_s: float = 45.0


def http_address(text: str) -> HttpAddress | None:
    """Parses "on" (the default address), "off" (None) or a loopback HOST:PORT; port 0: any free."""
    if text == "off":
        return None
    host, _, port = (DEFAULT_ADDRESS if text == "on" else text).rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError("want on, off or HOST:PORT")
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    if not _is_loopback(host):
        raise ValueError(
            "want a loopback address: the gateway asks nobody who they are; "
            "for others put a proxy with TLS and authentication before it"
        )
    return HttpAddress(host, int(port) or free_port(host))


def require_gateway() -> None:
    """Raises ConfigError that names the extra if the gateway is not installed."""
    if importlib.util.find_spec(_MODULE) is None:
        raise ConfigError(
            f"--http needs the package {_MODULE}: install the extra, pip install 'lockstep[http]'"
        )


def gateway_spec(
    address: HttpAddress,
    model_dir: Path,
    metrics: HttpAddress,
    drain_seconds: float,
    log_format: str,
    environ: Mapping[str, str],
) -> GatewaySpec:
    """A gateway for the model in `model_dir`. Raises ConfigError without a tokenizer."""
    if not (model_dir / "tokenizer.json").is_file():
        raise ConfigError(f"--http needs a tokenizer, and {model_dir} has no tokenizer.json")

    def command(grpc: str) -> Sequence[str]:
        return [
            *(sys.executable, "-P", "-m", _MODULE, "launch"),
            *("--host", address.host, "--port", str(address.port)),
            # Without a host of its own it would be on all interfaces.
            *("--prometheus-host", metrics.host, "--prometheus-port", str(metrics.port)),
            *("--worker-urls", f"grpc://{grpc}", "--policy", "round_robin"),
            *("--worker-startup-check-interval", "1", "--health-check-interval-secs", "2"),
            # There is one server behind it: to leave that out of routing is to refuse everything.
            *("--disable-circuit-breaker", "--disable-worker-overload-protection"),
            *("--worker-wedge-secs", str(_NO_WEDGE_S)),
            *("--max-payload-size", str(_MAX_PAYLOAD_BYTES)),
            *("--shutdown-grace-period-secs", str(max(1, math.ceil(drain_seconds)))),
            *("--log-level", "warn"),
            *(("--log-json",) if log_format == "json" else ()),
            *_parser_flags(model_dir),
        ]

    return GatewaySpec(
        address=address,
        command=command,
        is_ready=lambda: is_ready(address),
        environ={**environ, "HF_ENDPOINT": _NO_HUB},
        stop_timeout_s=drain_seconds + _STOP_MARGIN_S,
    )


def is_ready(address: HttpAddress) -> bool:
    """Whether the gateway says that it can answer; False as well if nobody says anything."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=_READY_TIMEOUT_S)
    try:
        connection.request("GET", "/readiness")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_port(host: str) -> int:
    """A port that was free a moment ago: the gateway cannot choose one by itself."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _parser_flags(model_dir: Path) -> Sequence[str]:
    """How the model writes calls of tools and thoughts, by its chat template."""
    template = _template(model_dir)
    flags: list[str] = []
    for mark, parser in _TOOL_PARSERS.items():
        if mark in template:
            flags += ["--tool-call-parser", parser]
            break
    if "enable_thinking" in template:
        flags += ["--reasoning-parser", "qwen3"]
    return flags


def _template(model_dir: Path) -> str:
    """The text of the chat template, of all if there are several; "" if there is none."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in _TEMPLATE_FILES:
        if (model_dir / name).is_file():
            holder = json.loads((model_dir / name).read_text(encoding="utf-8"))
            if "chat_template" in holder:
                return json.dumps(holder["chat_template"], ensure_ascii=False)
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
