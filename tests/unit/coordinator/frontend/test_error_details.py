"""google.rpc details: a program learns which field is at fault and when to try again."""

import asyncio
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.frontend.error_details import DETAILS_KEY, field_path, status_details
from protos.lockstep.v1 import generate_pb2
from protos.vllm_engine import vllm_engine_pb2
from tests.unit.coordinator.frontend.fake_engine import Served, serving, within
from tests.unit.coordinator.frontend.field_paths import is_field
from tests.unit.coordinator.frontend.test_bad_input import BAD

ASKED = generate_pb2.DESCRIPTOR.message_types_by_name["GenerateRequest"]
GATEWAY_ASKED = vllm_engine_pb2.DESCRIPTOR.message_types_by_name["GenerateRequest"]


async def failure(served: Served, message: generate_pb2.GenerateRequest) -> grpc.aio.AioRpcError:
    """How a call ends that does not end well."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await within(served.stub.Generate(message).read())
    return caught.value


def details_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """What grpc_status.rpc_status.from_call would return."""
    found = [value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY]
    assert len(found) == 1
    status = status_pb2.Status.FromString(found[0])
    assert status.code == error.code().value[0]
    assert status.message == (error.details() or "")[: len(status.message)]
    return status


def detail(status: status_pb2.Status, kind: type[Message]) -> list[Message]:
    found = []
    for packed in status.details:
        message = kind()
        if packed.Unpack(message):
            found.append(message)
    return found


def test_every_bad_request_names_a_field_of_the_request(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            for name, (message, _) in BAD.items():
                error = await failure(served, message)
                bad = detail(details_of(error), error_details_pb2.BadRequest)
                assert len(bad) == 1, name
                (violation,) = bad[0].field_violations  # type: ignore[attr-defined]
                assert is_field(violation.field, ASKED), (name, violation.field)
                assert violation.description

    asyncio.run(main())


def test_a_path_that_is_no_field_would_be_noticed() -> None:
    for path in ("sampling_params.stop[3]", "prompt", "chat.messages.content"):
        assert is_field(path, ASKED), path
    for path in ("stop[3]", "text.more", "", "chat.prompt", "request"):
        assert not is_field(path, ASKED), path


def test_what_the_engine_refuses_has_details_too(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            request = generate_pb2.GenerateRequest(text="hello")
            ended = asyncio.create_task(failure(served, request))
            submit = await served.engine.next_submit()
            served.engine.send(
                ended={
                    "handle": submit.handle,
                    "status_code": grpc.StatusCode.INVALID_ARGUMENT.value[0],
                    "status_message": "request_id is taken",
                    "field": "request_id",
                }
            )
            (bad,) = detail(details_of(await within(ended)), error_details_pb2.BadRequest)
            assert bad.field_violations[0].field == "request_id"  # type: ignore[attr-defined]

            for code, seconds in (
                (grpc.StatusCode.RESOURCE_EXHAUSTED, 2.5),
                (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.0),
                (grpc.StatusCode.UNAVAILABLE, 1.0),
            ):
                ended = asyncio.create_task(failure(served, request))
                submit = await served.engine.next_submit()
                served.engine.refuse(submit.handle, code, "later", seconds)
                error = await within(ended)
                (retry,) = detail(details_of(error), error_details_pb2.RetryInfo)
                delay = retry.retry_delay  # type: ignore[attr-defined]
                assert delay.ToMilliseconds() == round(seconds * 1000)
                pushback = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
                assert pushback == (str(round(seconds * 1000)) if seconds else None)

    asyncio.run(main())


def test_a_status_without_details_has_no_entry() -> None:
    assert status_details(grpc.StatusCode.UNAVAILABLE, "starting") == ()


def test_a_long_message_does_not_overflow_what_clients_take() -> None:
    ((_, packed),) = status_details(grpc.StatusCode.INVALID_ARGUMENT, "ä" * 100_000, "text")
    assert len(packed) < 4096


@pytest.mark.parametrize(
    ("named", "path"),
    [
        ("temperature", "sampling_params.temperature"),
        ("stop_token_ids", "sampling_params.stop_token_ids"),
        ("chat.messages", "chat.messages"),
        ("prompt", "prompt"),
        ("prompt[4]", "prompt"),
        ("prompt_logprobs", "sampling_params.prompt_logprobs"),
        ("request_id", "request_id"),
        ("request.sampling_params.stop", "sampling_params.stop"),
        ("request", "request"),
        ("field 7 of lockstep.v1.GenerateRequest", "request"),
    ],
)
def test_paths_of_fields(named: str, path: str) -> None:
    assert field_path(named, ASKED) == path


@pytest.mark.parametrize(
    ("named", "path"),
    [
        ("grammar", "sampling_params.grammar"),
        ("truncate_prompt_tokens", "sampling_params.truncate_prompt_tokens"),
        ("tokenized.input_ids[3]", "tokenized.input_ids[3]"),
        ("input[4]", "input"),
        ("prompt", "request"),
    ],
)
def test_paths_of_fields_in_a_gateways_request(named: str, path: str) -> None:
    assert field_path(named, GATEWAY_ASKED) == path


def test_health_tells_the_cause_beside_not_serving(model: Path) -> None:
    async def main() -> None:
        async with serving(model) as served:
            stub = health_pb2_grpc.HealthStub(served.channel)

            async def cause(service: str) -> object:
                call = stub.Check(health_pb2.HealthCheckRequest(service=service))
                await within(call)
                return dict(await call.trailing_metadata()).get("lockstep-cause")

            served.engine.send_state(
                is_ready=False, cause="rank 1 lost:\n¿?", ranks_up=[True, False]
            )
            watch = stub.Watch(health_pb2.HealthCheckRequest(service="rank/1"))
            while (await within(watch.read())).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                pass
            for name in ("", "readiness", "rank/1"):
                assert await cause(name) == r"rank 1 lost: \xbf?", name
            for name in ("liveness", "rank/0"):
                assert await cause(name) is None, name
            served.engine.send(drain={"budget_seconds": 0.1})
            assert await within(watch.read()) is grpc.aio.EOF
            told = dict(await within(watch.trailing_metadata()))
            assert "lockstep-cause" in told

    asyncio.run(main())
