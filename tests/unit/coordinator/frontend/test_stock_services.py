"""Health and reflection among clients that anybody may be."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator.frontend import health as health_module
from coordinator.frontend import stock_services
from coordinator.frontend.health import HealthService
from coordinator.frontend.server import ConnectionLimits, bind, build_server
from tests.unit.coordinator.frontend.fake_engine import open_channel, within

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[Any]:
    """A channel to a server that has nothing but its stock services."""
    handler = grpc.method_handlers_generic_handler("lockstep.v1.GenerateService", {})
    health = HealthService()
    server = build_server((handler,), health, 1, ConnectionLimits(64, 64))
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        health.close()
        await server.stop(None)


@pytest.mark.parametrize("path", [CHECK, WATCH])
def test_what_does_not_parse_is_refused_without_a_line_in_the_log(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with served() as channel:
            for raw in (b"\xff\xff", b"\x0a\x02\xff\xfe"):
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    await within(channel.unary_stream(path)(raw).read())
                assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())
    # Where several event loops have used gRPC, asyncio may note that another one read its wake-up.
    assert not [record for record in caplog.records if record.name != "asyncio"]


def test_a_field_that_is_not_known_is_ignored() -> None:
    async def main() -> None:
        async with served() as channel:
            raw = health_pb2.HealthCheckRequest(service="liveness").SerializeToString()
            answer = await within(channel.unary_unary(CHECK)(raw + b"\xba\x3e\x01x"))
            status = health_pb2.HealthCheckResponse.FromString(answer).status
            assert status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(main())


@pytest.mark.parametrize("path", [CHECK, WATCH])
def test_a_call_without_a_message_ends(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_services, "_MESSAGE_SECONDS", 0.05)

    async def main() -> None:
        async with served() as channel:
            for is_closed in (True, False):
                call = channel.stream_stream(path)()
                if is_closed:
                    await within(call.done_writing())
                assert await within(call.code()) is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())


def test_watchers_beyond_the_limit_are_refused_until_one_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health_module, "MAX_WATCHERS", 2)

    async def main() -> None:
        async with served() as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="liveness")
            watching = [stub.Watch(request) for _ in range(2)]
            for call in watching:
                await within(call.read())
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await within(stub.Watch(request).read())
            assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await within(stub.Check(request))
            watching[0].cancel()
            async with asyncio.timeout(20):
                while True:
                    try:
                        assert await stub.Watch(request).read() is not grpc.aio.EOF
                        break
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(0)

    asyncio.run(main())


def test_reflection_lists_the_services_and_answers_garbage(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with served() as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            answer = await within(stub.ServerReflectionInfo(asked).read())
            names = {service.name for service in answer.list_services_response.service}
            assert {"lockstep.v1.GenerateService", "grpc.health.v1.Health"} < names
            raw = await within(channel.unary_stream(REFLECTION)(b"\xff\xff").read())
            error = reflection_pb2.ServerReflectionResponse.FromString(raw).error_response
            assert error.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]

    asyncio.run(main())
    assert not caplog.records
