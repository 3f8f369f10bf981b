"""gRPC's own services, health and reflection, with deserialisers of ours.

The stock ones raise on bytes that are no message, and gRPC then writes a traceback into the log for
each: a client without any key could fill the disk.
"""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from coordinator.frontend.health import HealthService
from coordinator.frontend.rejections import answered
from coordinator.frontend.wire import deserialiser

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


def health_handler(health: HealthService) -> grpc.GenericRpcHandler:
    """Check and Watch; what does not parse is INVALID_ARGUMENT, what is unknown is ignored."""
    parse = deserialiser(health_pb2.HealthCheckRequest, refuses_unknown=False)
    write = health_pb2.HealthCheckResponse.SerializeToString
    handlers = {
        "Check": grpc.unary_unary_rpc_method_handler(
            answered(health.Check, _count_nothing), parse, write
        ),
        "Watch": grpc.unary_stream_rpc_method_handler(
            answered(health.Watch, _count_nothing), parse, write
        ),
    }
    return grpc.method_handlers_generic_handler(HEALTH, handlers)


def reflection_handler(services: tuple[str, ...]) -> grpc.GenericRpcHandler:
    """Reflection of these services; what does not parse is answered like an empty question."""
    servicer: Any = reflection.aio.ReflectionServicer((*services, reflection.SERVICE_NAME))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        _parse_question,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": handler}
    return grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, handlers)


def _parse_question(raw: bytes) -> reflection_pb2.ServerReflectionRequest:
    try:
        return reflection_pb2.ServerReflectionRequest.FromString(raw)
    except DecodeError:
        return reflection_pb2.ServerReflectionRequest()


def _count_nothing(reason: str) -> None:
    """These are no requests to the engine."""
