"""Handlers as the protos declare the methods."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from coordinator.frontend.services import GENERATE_SERVICE, VLLM_ENGINE, service_handler
from protos.lockstep.v1 import generate_pb2
from tests.unit.coordinator.frontend.fake_engine import serving, within, write_ids_only_model
from tests.unit.coordinator.frontend.test_error_details import detail, details_of

UNARY = "/lockstep.v1.GenerateService/GenerateUnary"


async def unimplemented(request: Any, context: Any) -> None:
    """A method."""


@pytest.mark.parametrize("service", [GENERATE_SERVICE, VLLM_ENGINE], ids=lambda it: str(it.name))
def test_each_method_of_the_proto_has_a_handler_of_its_kind(service: Any) -> None:
    methods = {method.name: unimplemented for method in service.methods}
    handler: Any = service_handler(service, methods, lambda reason: None)
    assert handler.service_name() == service.full_name
    for method in service.methods:
        path = f"/{service.full_name}/{method.name}"
        found = handler.service(type("Details", (), {"method": path, "invocation_metadata": ()}))
        assert found.response_streaming == method.server_streaming
        assert not found.request_streaming


def test_a_method_that_nobody_serves_is_noticed_at_once() -> None:
    with pytest.raises(KeyError, match="Generate"):
        service_handler(GENERATE_SERVICE, {}, lambda reason: None)


def test_fields_of_a_unary_call_are_named_from_what_it_wraps(tmp_path: Path) -> None:
    bad = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=[1]),
        sampling_params=generate_pb2.SamplingParams(top_p=2.0),
    )
    cases = {
        generate_pb2.GenerateUnaryRequest(request=bad).SerializeToString(): (
            "sampling_params.top_p"
        ),
        b"\x0a\x04\x1a\x02\xff\xfe": "text",  # not UTF-8
    }

    async def main() -> None:
        async with serving(write_ids_only_model(tmp_path)) as served:
            for raw, path in cases.items():
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await within(served.channel.unary_unary(UNARY)(raw))
                (found,) = detail(details_of(caught.value), error_details_pb2.BadRequest)
                assert found.field_violations[0].field == path  # type: ignore[attr-defined]

    asyncio.run(main())


def test_only_refused_generate_calls_count(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(write_ids_only_model(tmp_path)) as served:
            for call in (
                served.stub.Abort(generate_pb2.AbortRequest()),
                served.stub.GenerateUnary(generate_pb2.GenerateUnaryRequest()),
            ):
                with pytest.raises(grpc.aio.AioRpcError):
                    await within(call)
            await within(served.engine.rejections_arrived.wait())
            assert served.engine.rejected == {"invalid_argument": 1}

    asyncio.run(main())
