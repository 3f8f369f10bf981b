"""Our services as the protos declare them, and handlers for their methods."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from coordinator.frontend.rejections import answered
from coordinator.frontend.wire import deserialiser
from protos.lockstep.v1 import generate_pb2
from protos.vllm_engine import vllm_engine_pb2

GENERATE_SERVICE = generate_pb2.DESCRIPTOR.services_by_name["GenerateService"]
VLLM_ENGINE = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"]

Method = Callable[[Any, Any], Awaitable[Any]]


def service_handler(
    service: ServiceDescriptor,
    methods: Mapping[str, Method],
    count_rejected: Callable[[str], None],
) -> grpc.ServiceRpcHandler:
    """What a server is given to serve all methods of `service`, by their names in the proto.

    `count_rejected` is told of refused Generate calls; others are no requests to the engine.
    """
    handlers = {
        method.name: _method_handler(
            method,
            methods[method.name],
            count_rejected if method.name.startswith("Generate") else None,
        )
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _method_handler(
    method: MethodDescriptor, serve: Method, count: Callable[[str], None] | None
) -> grpc.RpcMethodHandler:
    make: Any = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(
        answered(serve, count, _root(method.input_type)),
        request_deserializer=deserialiser(method.input_type),
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )


def _root(asked: Descriptor) -> Descriptor:
    """Where the paths of a request's fields begin: in what it wraps, if it wraps another."""
    wrapped = asked.fields_by_name.get("request")
    return asked if wrapped is None or wrapped.message_type is None else wrapped.message_type
