"""How a test reaches a server: its address, TLS, and the API key that says who calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc

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
