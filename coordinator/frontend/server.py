"""The public gRPC server: its options, services and port."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.errors import CoordinatorError
from coordinator.frontend.health import HealthService
from lockstep.daemon.addresses import bind_problem
from protos.vllm_engine import vllm_engine_pb2

# A 10 MB text must reach our own check, whose answer names field and limit.
MAX_RECEIVE_BYTES = 64 * 2**20
# How soon a client that vanished without a word, or hangs, is noticed: twice this.
KEEPALIVE_SECONDS = 20.0


class AddressUnavailable(CoordinatorError):
    """The address cannot be bound."""


def server_options(
    num_frontends: int, keepalive_s: float = KEEPALIVE_SECONDS
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
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms),
        ("grpc.http2.ping_timeout_ms", keepalive_ms),
    ]


def build_server(
    generate_handler: grpc.GenericRpcHandler,
    health: HealthService,
    num_frontends: int,
    keepalive_s: float = KEEPALIVE_SECONDS,
) -> Any:
    """A grpc.aio server with Generate, health and reflection; not bound, not started."""
    server = grpc.aio.server(options=server_options(num_frontends, keepalive_s))
    server.add_generic_rpc_handlers((generate_handler,))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (
        "lockstep.v1.GenerateService",
        vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection.SERVICE_NAME,
    )
    reflection.enable_server_reflection(names, server)
    return server


def bind(server: Any, host: str, port: int, num_frontends: int = 1) -> int:
    """Binds and returns the port (the kernel's choice for 0). Raises AddressUnavailable."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        problem = bind_problem(host, port, reuse_port=num_frontends > 1)
        if not problem:
            return int(server.add_insecure_port(address))
    except RuntimeError as error:
        problem = str(error)
    raise AddressUnavailable(
        f"cannot listen on {address}: {problem}; "
        "stop what runs there, or choose another --host or --port"
    )
