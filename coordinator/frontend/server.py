"""The public gRPC server: its options, limits, services and port."""

import logging
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from coordinator.errors import CoordinatorError
from coordinator.frontend.health import HealthService
from coordinator.frontend.stock_services import HEALTH, health_handler, reflection_handler
from lockstep.daemon.addresses import bind_problem
from lockstep.daemon.tls_files import ReloadedTls, TlsMaterial

_LOG = logging.getLogger(__name__)
# A 10 MB text must reach our own check, whose answer names field and limit.
MAX_RECEIVE_BYTES = 16 * 2**20
# Of a call's metadata; beyond the first gRPC refuses some calls, beyond the second all.
_METADATA_BYTES, _MAX_METADATA_BYTES = 8 * 2**10, 16 * 2**10
# For a connection to say that it speaks HTTP/2, and to shake hands.
_HANDSHAKE_SECONDS = 20.0
# Calls open at once in a frontend, those too whose client has not sent its message yet.
_MAX_OPEN_CALLS = 16384
# Calls that have come and that Python has not taken yet, those that were reset meanwhile included.
# Above 1,000, by default, gRPC cancels new calls at random: a storm of opened and reset calls on
# one connection would end those of others. Reset ones are skipped when Python looks; till then each
# costs some 10 KB.
_MAX_PENDING_CALLS = 32_768
# Files that are not clients' connections.
_OTHER_FILES = 256
# How soon a client that vanished without a word, or hangs, is noticed: twice this.
KEEPALIVE_SECONDS = 20.0


class AddressUnavailable(CoordinatorError):
    """The address cannot be bound."""


@dataclass(frozen=True)
class ConnectionLimits:
    """What one frontend takes of its clients."""

    max_connections: int
    max_concurrent_streams: int
    """Open calls on one connection."""


def server_options(
    num_frontends: int, limits: ConnectionLimits, keepalive_s: float = KEEPALIVE_SECONDS
) -> list[tuple[str, int]]:
    """gRPC channel arguments of the public server.

    One frontend takes its port alone, so that a second server there is an error and not a thief of
    every other call. Clients may ping as often as they like, also without calls in flight: a long
    prefill is silent, and gateways keep idle channels alive. We ping too: a client that is gone
    without closing its connection would otherwise have its requests run to their end.
    """
    keepalive_ms = round(keepalive_s * 1000)
    return [
        ("grpc.so_reuseport", 1 if num_frontends > 1 else 0),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", limits.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING_CALLS),
        ("grpc.server_handshake_timeout_ms", round(_HANDSHAKE_SECONDS * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms),
        ("grpc.http2.ping_timeout_ms", keepalive_ms),
    ]


def build_server(
    handlers: Sequence[grpc.ServiceRpcHandler],
    health: HealthService,
    num_frontends: int,
    limits: ConnectionLimits,
    keepalive_s: float = KEEPALIVE_SECONDS,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> Any:
    """A grpc.aio server of `handlers`, health and reflection; not bound, not started."""
    server = grpc.aio.server(
        interceptors=interceptors,
        options=server_options(num_frontends, limits, keepalive_s),
        maximum_concurrent_rpcs=_MAX_OPEN_CALLS,
    )
    names = (*(handler.service_name() for handler in handlers), HEALTH)
    server.add_generic_rpc_handlers((*handlers, health_handler(health), reflection_handler(names)))
    return server


def server_credentials(tls: ReloadedTls) -> Any:
    """Credentials that take changed files at the next handshake."""
    needs_client_cert = tls.first.ca is not None

    def changed() -> Any:
        material = tls.changed()
        return None if material is None else _configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(tls.first), changed, require_client_authentication=needs_client_cert
    )


def _configuration(material: TlsMaterial) -> Any:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.ca)


def raise_file_limit(max_connections: int) -> None:
    """Lets this process open as many files as it may have connections, as far as it is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < wanted:
        _LOG.warning(
            "the limit of open files is %d: fewer than --max-connections %d fit",
            hard,
            max_connections,
        )
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind(server: Any, host: str, port: int, num_frontends: int = 1, credentials: Any = None) -> int:
    """Binds, with TLS where there are `credentials`; returns the port (the kernel's choice for 0).

    Raises AddressUnavailable.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        problem = bind_problem(host, port, reuse_port=num_frontends > 1)
        if not problem:
            if credentials is None:
                return int(server.add_insecure_port(address))
            return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        problem = str(error)
    raise AddressUnavailable(
        f"cannot listen on {address}: {problem}; "
        "stop what runs there, or choose another --host or --port"
    )
