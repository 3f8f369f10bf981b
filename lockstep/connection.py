"""How the commands reach a server: its address, TLS, and the API key that says who calls."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc

from lockstep.errors import ConfigError

_DEFAULT_ADDRESS = "127.0.0.1:50051"


@dataclass(frozen=True)
class Connection:
    """A server and how to speak to it. `api_key` goes with every call.

    `tls_ca`: PEM CAs that the server must be of; b"" are those of the system; None is no TLS.
    `tls_cert` and `tls_key`: PEM certificate and key for servers that ask clients for one.
    `tls_server_name`: what the server's certificate is for; None: the host in `address`.
    """

    address: str = _DEFAULT_ADDRESS
    tls_ca: bytes | None = None
    tls_cert: bytes | None = None
    tls_key: bytes | None = field(default=None, repr=False)
    tls_server_name: str | None = None
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def of_options(cls, options: argparse.Namespace) -> Self:
        """What the flags of `add_connection_flags` say. Raises ConfigError."""
        if bool(options.tls_cert) != bool(options.tls_key):
            raise ConfigError("--tls-cert and --tls-key go together: give both or neither")
        has_tls = options.tls or options.tls_ca is not None or options.tls_cert is not None
        key = _read("--api-key-file", options.api_key_file)
        return cls(
            address=options.address,
            tls_ca=(_read("--tls-ca", options.tls_ca) or b"") if has_tls else None,
            tls_cert=_read("--tls-cert", options.tls_cert),
            tls_key=_read("--tls-key", options.tls_key),
            tls_server_name=options.tls_server_name,
            api_key=None if key is None else _one_line(options.api_key_file, key),
        )

    def channel(self, options: Sequence[tuple[str, Any]]) -> Any:
        """A channel; nothing is sent yet."""
        if self.tls_ca is None:
            channel = grpc.insecure_channel(self.address, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(
                self.tls_ca or None, self.tls_key, self.tls_cert
            )
            name = self.tls_server_name
            named = [*options, ("grpc.ssl_target_name_override", name)] if name else options
            channel = grpc.secure_channel(self.address, credentials, options=named)
        if self.api_key is None:
            return channel
        return grpc.intercept_channel(channel, _ShowKey(self.api_key))


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --address and what TLS and API keys need."""
    add = parser.add_argument_group("connection").add_argument
    text = f"host:port of the server (default: {_DEFAULT_ADDRESS})"
    add("--address", default=_DEFAULT_ADDRESS, metavar="HOST:PORT", help=text)
    add("--tls", action="store_true", help="speak TLS; the server is of a CA of this system")
    add("--tls-ca", type=Path, metavar="FILE", help="speak TLS; the server is of this PEM CA")
    add("--tls-cert", type=Path, metavar="FILE", help="our PEM certificate, if it wants one")
    add("--tls-key", type=Path, metavar="FILE", help="PEM private key of --tls-cert")
    add("--tls-server-name", metavar="NAME", help="in its certificate, if not HOST")
    add("--api-key-file", type=Path, metavar="FILE", help="file with our API key")


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]]
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _ShowKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the key to each call's metadata: gRPC's own call credentials want TLS, loopback not."""

    def __init__(self, key: str) -> None:
        self._entry = ("authorization", f"Bearer {key}")

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], details: Any, request: Any
    ) -> Any:
        return continuation(self._with_key(details), request)

    def intercept_unary_stream(
        self, continuation: Callable[[Any, Any], Any], details: Any, request: Any
    ) -> Any:
        return continuation(self._with_key(details), request)

    def _with_key(self, details: Any) -> _Details:
        return _Details(
            details.method,
            details.timeout,
            (*(details.metadata or ()), self._entry),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )


def _read(flag: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None


def _one_line(path: Path, raw: bytes) -> str:
    words = raw.split()
    if len(words) != 1 or not words[0].isascii():
        raise ConfigError(f"--api-key-file {path}: it must hold one key and nothing else")
    return words[0].decode("ascii")
