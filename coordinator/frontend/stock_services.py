"""gRPC's own services, health and reflection, with deserialisers of ours.

The stock ones raise on bytes that are no message, and gRPC then writes a traceback into the log for
each: a client without any key could fill the disk.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from coordinator.frontend.health import HealthService
from coordinator.frontend.rejections import answered
from coordinator.frontend.wire import deserialiser

_MESSAGE_SECONDS = 10.0
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_ASKED = health_pb2.HealthCheckRequest.DESCRIPTOR


def health_handler(health: HealthService) -> grpc.GenericRpcHandler:
    """Check and Watch; what does not parse is INVALID_ARGUMENT, what is unknown is ignored."""
    parse = deserialiser(_ASKED, refuses_unknown=False)
    write = health_pb2.HealthCheckResponse.SerializeToString
    handlers = {
        name: grpc.stream_stream_rpc_method_handler(_of_one_message(method), parse, write)
        for name, method in (("Check", health.Check), ("Watch", health.Watch))
    }
    return grpc.method_handlers_generic_handler(HEALTH, handlers)


def _of_one_message(
    method: Callable[[Any, Any], Awaitable[Any]],
) -> Callable[[Any, Any], Awaitable[None]]:
    """Serves a call of one message as a stream: only so can we stop waiting for the message.

    Anybody may open these calls. On the wire they are the same.
    """
    answer = answered(method, None, _ASKED)

    async def handler(requests: Any, context: Any) -> None:
        request, problem = None, "the call has no message"
        try:
            async with asyncio.timeout(_MESSAGE_SECONDS):
                request = await anext(aiter(requests), None)
        except TimeoutError:
            problem = f"no message within {_MESSAGE_SECONDS:g} s"
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
            raise AssertionError("abort always raises")
        response = await answer(request, context)
        if response is not None:
            await context.write(response)

    return handler


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
