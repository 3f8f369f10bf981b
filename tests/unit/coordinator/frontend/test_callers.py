"""With API keys: who is let in, whose requests are whose, and what stays open."""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.lockstep.v1 import generate_pb2
from tests.unit.coordinator.frontend.fake_engine import (
    Served,
    serving,
    within,
    write_ids_only_model,
)

ACME = (("authorization", "Bearer key-of-acme"),)
OTHER = (("authorization", "bearer key-of-other"),)
PROMPT = generate_pb2.TokenIds(ids=[1, 2])


def write_keys(path: Path, **keys: str) -> Path:
    lines = [f"{k} sha256:{hashlib.sha256(v.encode()).hexdigest()}" for k, v in keys.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


@contextlib.asynccontextmanager
async def guarded(folder: Path) -> AsyncIterator[Served]:
    """A frontend with a key of `acme` and one of `other`."""
    keys = write_keys(folder / "keys", acme="key-of-acme", other="key-of-other")
    model = write_ids_only_model(folder / "model")
    async with serving(model, metadata=ACME, api_keys=str(keys)) as served:
        yield served


def calls(served: Served, metadata: Any) -> Iterator[tuple[str, Any]]:
    """Every guarded call, not awaited yet."""
    request = generate_pb2.GenerateRequest(token_ids=PROMPT)
    stub = served.stub
    yield "Generate", stub.Generate(request, metadata=metadata).read()
    unary = generate_pb2.GenerateUnaryRequest(request=request)
    yield "GenerateUnary", stub.GenerateUnary(unary, metadata=metadata)
    yield "Abort", stub.Abort(generate_pb2.AbortRequest(request_id="r"), metadata=metadata)
    yield "ModelInfo", stub.GetModelInfo(generate_pb2.GetModelInfoRequest(), metadata=metadata)
    yield "ServerInfo", stub.GetServerInfo(generate_pb2.GetServerInfoRequest(), metadata=metadata)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    reflection = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    yield "reflection", reflection.ServerReflectionInfo(asked, metadata=metadata).read()
    unknown = served.channel.unary_unary("/no.such/Method")
    yield "unknown", unknown(b"", metadata=metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer wrong"),),
        (("authorization", "key-of-acme"),),
        (("authorization", "Basic key-of-acme"),),
        (("authorization", ""),),
        (*ACME, *ACME),
        (("x-api-key", "key-of-acme"),),
        (("authorization-bin", b"Bearer key-of-acme"),),
    ],
)
def test_every_call_without_a_known_key_is_unauthenticated(tmp_path: Path, metadata: Any) -> None:
    async def main() -> None:
        async with guarded(tmp_path) as served:
            for name, call in calls(served, metadata):
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    await within(call)
                assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED, name
                assert "key-of-acme" not in (ended.value.details() or "")
            await within(served.engine.rejections_arrived.wait())
            assert served.engine.submits.empty() and served.engine.aborts.empty()

    asyncio.run(main())


def test_health_is_open_to_probes_without_keys(tmp_path: Path) -> None:
    async def main() -> None:
        async with guarded(tmp_path) as served:
            stub = health_pb2_grpc.HealthStub(served.channel)
            request = health_pb2.HealthCheckRequest(service="readiness")
            answer = await within(stub.Check(request))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watched = await within(stub.Watch(request).read())
            assert watched.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(main())


def test_a_refused_call_ends_before_its_message_has_come(tmp_path: Path) -> None:
    """Calls that are opened and then left alone cost nothing where their caller is not known."""

    async def main() -> None:
        async with guarded(tmp_path) as served:
            method = "/lockstep.v1.GenerateService/Generate"
            call = served.channel.stream_stream(method)()
            assert await within(call.code()) is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(main())


def test_a_request_counts_for_the_tenant_of_its_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with guarded(tmp_path) as served:
            for metadata, named, tenant in (
                (ACME, "", "acme"),
                (ACME, "acme", "acme"),
                (OTHER, "", "other"),
            ):
                request = generate_pb2.GenerateRequest(token_ids=PROMPT, tenant=named)
                call = served.stub.Generate(request, metadata=metadata)
                submit = await served.engine.next_submit()
                assert submit.tenant == tenant
                call.cancel()
                await served.engine.next_release()

    asyncio.run(main())


def test_another_tenants_name_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with guarded(tmp_path) as served:
            request = generate_pb2.GenerateRequest(token_ids=PROMPT, tenant="other")
            abort = generate_pb2.AbortRequest(request_id="r", tenant="other")
            unary = generate_pb2.GenerateUnaryRequest(request=request)
            for call in (
                served.stub.Generate(request, metadata=ACME).read(),
                served.stub.GenerateUnary(unary, metadata=ACME),
                served.stub.Abort(abort, metadata=ACME),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match="tenant is 'other'") as ended:
                    await within(call)
                assert ended.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert served.engine.submits.empty() and served.engine.aborts.empty()

    asyncio.run(main())


def test_abort_names_the_callers_own_requests_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with guarded(tmp_path) as served:
            abort = served.stub.Abort(generate_pb2.AbortRequest(request_id="r"), metadata=OTHER)
            asked = await within(served.engine.aborts.get())
            assert (asked.tenant, asked.request_id) == ("other", "r")
            served.engine.send(abort_outcome={"query": asked.query, "was_active": False})
            assert not (await within(abort)).was_active

    asyncio.run(main())


def test_without_keys_a_tenant_is_what_the_caller_says(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(write_ids_only_model(tmp_path)) as served:
            request = generate_pb2.GenerateRequest(token_ids=PROMPT, tenant="any")
            call = served.stub.Generate(request, metadata=(("authorization", "Bearer x"),))
            assert (await served.engine.next_submit()).tenant == "any"
            call.cancel()
            abort = served.stub.Abort(generate_pb2.AbortRequest(request_id="r", tenant="any"))
            asked = await within(served.engine.aborts.get())
            assert asked.tenant == "any"
            served.engine.send(abort_outcome={"query": asked.query, "was_active": True})
            assert (await within(abort)).was_active

    asyncio.run(main())


def test_a_key_that_is_taken_out_of_the_file_is_refused_soon(tmp_path: Path) -> None:
    async def main() -> None:
        async with guarded(tmp_path) as served:
            info = generate_pb2.GetServerInfoRequest()
            assert (await within(served.stub.GetServerInfo(info, metadata=OTHER))).is_ready
            fresh = write_keys(tmp_path / "new", acme="key-of-acme", third="key-of-third")
            os.replace(fresh, tmp_path / "keys")
            async with asyncio.timeout(20):
                while True:
                    try:
                        await served.stub.GetServerInfo(info, metadata=OTHER)
                    except grpc.aio.AioRpcError as error:
                        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                        break
            third = (("authorization", "Bearer key-of-third"),)
            for metadata in (ACME, third):
                assert (await within(served.stub.GetServerInfo(info, metadata=metadata))).is_ready

    asyncio.run(main())
