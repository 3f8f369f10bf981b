"""The connection: options, credentials, metadata; the same for the sync and the async client."""

from pathlib import Path
from typing import Any

import grpc

from lockstep.client.config import ClientConfig, Tls
from lockstep.errors import ConfigError

# A server that is gone without a word, or hangs, is noticed after the two together.
_KEEPALIVE_MS = 20_000
# gRPC by itself waits up to two minutes before it connects again, and fails calls meanwhile.
_MIN_RECONNECT_MS = 200
_MAX_RECONNECT_MS = 2_000

Options = list[tuple[str, int | str]]
Metadata = tuple[tuple[str, str], ...]


def open_channel(address: str, config: ClientConfig) -> Any:
    """A grpc.Channel. Raises ConfigError."""
    credentials, options = _credentials(config.tls), _options(config.tls)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def open_async_channel(address: str, config: ClientConfig) -> Any:
    """A grpc.aio.Channel, of the running event loop. Raises ConfigError."""
    credentials, options = _credentials(config.tls), _options(config.tls)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def call_metadata(config: ClientConfig) -> Metadata:
    """What every call carries."""
    return (("authorization", f"Bearer {config.api_key}"),) if config.api_key else ()


def _options(tls: Tls | None) -> Options:
    options: Options = [
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
        ("grpc.initial_reconnect_backoff_ms", _MIN_RECONNECT_MS),
        ("grpc.min_reconnect_backoff_ms", _MIN_RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS),
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def _credentials(tls: Tls | None) -> Any:
    if tls is None:
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca),
        private_key=_read(tls.key),
        certificate_chain=_read(tls.cert),
    )


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS: cannot read {path}: {error.strerror}") from error
